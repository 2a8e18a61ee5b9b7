"""Exports a run's FRoD adapter as a folder of its own and proves it the same function."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_scale.artifacts.compare import (
    LogitsDifference,
    compare_logits,
    comparison_ids,
    compute_logits,
    require_same,
)
from spectral_scale.artifacts.model_folder import staged_folder
from spectral_scale.artifacts.restore import SavedRun, open_run, restore_model
from spectral_scale.config.methods import chosen_spec
from spectral_scale.engine.build import MASTER_DTYPES, initial_weights
from spectral_scale.errors import ConfigError
from spectral_scale.methods.frod.adapter import load_adapter, save_adapter
from spectral_scale.models.build import build_model, materialise
from spectral_scale.models.weights import initialise_dense
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.table import parameter_table


@dataclass(frozen=True, kw_only=True)
class AdapterResult:
    """What was written, and how far it is from the model that trained."""

    output: Path
    """The folder."""
    step: int
    """The step of the checkpoint."""
    coefficients: int
    """The number of trained elements in the adapter."""
    difference: LogitsDifference
    """The base model with the adapter loaded, compared with the training model."""


def export_adapter(target: Path, output: Path, *, device: str = "auto") -> AdapterResult:
    """Write the adapter of a run or checkpoint, load it into the run's base model, compare logits.

    Raises ConfigError for a run of another method or one whose dense parameters trained too, and
    SpectralScaleError if the logits differ; the folder then does not exist.
    """
    run = open_run(target)
    _require_adapter(run)
    chosen = pick_device(device, 0)
    trained = restore_model(run, device=chosen, exact=True)
    length, rows = run.config.model.sequence_length, run.architecture.vocab_size
    ids = comparison_ids(None, sequence_length=length, vocab_size=rows)
    expected = compute_logits(trained, ids)
    with staged_folder(output) as folder:
        coefficients = save_adapter(trained, folder)
        difference = compare_logits(expected, _logits_with_adapter(run, folder, chosen, ids))
        require_same(difference, "the base model with the adapter is not the trained one")
    return AdapterResult(
        output=output, step=run.step, coefficients=coefficients, difference=difference
    )


def _require_adapter(run: SavedRun) -> None:
    spectral = run.config.spectral
    if not chosen_spec(spectral).has_adapter:
        raise ConfigError(
            f"{run.folder} was trained with spectral.method={spectral.method}, and adapters are "
            "FRoD's; export it without --adapter"
        )
    if spectral.train_dense:
        raise ConfigError(
            f"{run.folder} also trained embeddings, norms and biases, which an adapter leaves out; "
            "export it without --adapter, or train with spectral.train_dense=false"
        )
    if spectral.train_also:
        raise ConfigError(
            f"{run.folder} also trained {spectral.train_also}, which an adapter leaves out; "
            "export it without --adapter"
        )


def _logits_with_adapter(run: SavedRun, folder: Path, device: torch.device, ids: Tensor) -> Tensor:
    """Logits of the weights that the run started from, with the adapter loaded into them."""
    model = build_model(run.architecture, run.config.model, eos_token_id=None)
    table = parameter_table(model)
    materialise(model, device=device, dtype=MASTER_DTYPES[run.config.train.precision])
    initialise_dense(model, table, initial_weights(run.config))
    load_adapter(model, folder)
    return compute_logits(model.eval(), ids)
