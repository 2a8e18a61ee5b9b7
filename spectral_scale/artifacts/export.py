"""Exports a run's weights as a dense transformers folder and proves it the same function."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectral_scale import __version__
from spectral_scale.artifacts.compare import (
    LogitsDifference,
    compare_logits,
    comparison_ids,
    compute_logits,
    require_same,
)
from spectral_scale.artifacts.model_folder import (
    copy_tokenizer,
    refuse_occupied,
    staged_folder,
    write_model,
    write_record,
)
from spectral_scale.artifacts.perplexity import EVERYTHING, evaluate_model
from spectral_scale.artifacts.prune import (
    PrunableModel,
    PrunedPoint,
    check_fraction,
    curve_table,
    pruning_curve,
)
from spectral_scale.artifacts.restore import SavedRun, open_run, restore_model
from spectral_scale.artifacts.run_tokens import require_undamaged_tokenizer, tokens_of_run
from spectral_scale.config.schema import DataConfig
from spectral_scale.data.loader import ValidationLoader
from spectral_scale.data.tokens import TokenFolder
from spectral_scale.engine.evaluate import Watch
from spectral_scale.errors import ConfigError
from spectral_scale.methods.convert import find_targets, merge
from spectral_scale.models.folder import load_folder, quiet_transformers
from spectral_scale.parallel.device import pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export."""

    target: Path
    """A run folder (its newest good checkpoint) or one checkpoint."""
    output: Path | None
    """The folder to write; None: only the pruning curve."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of the stored weights."""
    keep: float = 1.0
    """The fraction of each converted matrix's singular values to keep in the folder."""
    prune: Sequence[float] = ()
    """Fractions to measure perplexity at."""
    data: Path | None = None
    """A token folder; None: the run's own."""
    with_tokenizer: bool = True
    """Whether to copy the tokenizer; False exports weights only and needs no data."""
    sequences: int | None = DataConfig.validation_sequences
    """Sequences for the curve; None: all of the data."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was exported, and how far it is from the model that trained."""

    output: Path | None
    """The folder, or None."""
    step: int
    """The step of the checkpoint."""
    merged: int
    """The number of converted layers made dense."""
    compared_on: str
    """Where the tokens of the comparison came from."""
    merge: LogitsDifference
    """Dense model against the training model, both in memory and unpruned."""
    stored: LogitsDifference | None
    """The folder as transformers loads it against what was to be written."""
    trained: LogitsDifference | None
    """The folder against the training model: includes pruning and bf16 rounding, if asked for."""
    curve: list[PrunedPoint]
    """Perplexity by kept fraction."""


def export_run(request: ExportRequest, watch: Watch | None = None) -> ExportResult:
    """Restore, merge, compare, measure the pruning curve, write, load back, compare.

    Raises ConfigError, DataError or CheckpointError, and SpectralScaleError if a comparison fails;
    the output folder then does not exist.
    """
    _check(request)
    job = _start(request)
    merged = merge(job.model)
    merge_check = compare_logits(job.trained, compute_logits(job.model, job.ids))
    require_same(merge_check, "the merged model is not the trained one")
    curve = _prune(job, watch)
    stored, against = (None, None) if request.output is None else _write(job, request.output, curve)
    return ExportResult(
        output=request.output,
        step=job.run.step,
        merged=merged,
        compared_on="random token ids" if job.tokens is None else str(job.tokens.path),
        merge=merge_check,
        stored=stored,
        trained=against,
        curve=curve,
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The model on its way out."""

    request: ExportRequest
    run: SavedRun
    tokens: TokenFolder | None
    model: PreTrainedModel
    """Restored; then merged, pruned and cast in place."""
    ids: Tensor
    """The token ids that logits are compared on."""
    trained: Tensor
    """The training model's logits there."""


def _check(request: ExportRequest) -> None:
    """Refuse what cannot be done, before anything is read."""
    if request.output is None and not request.prune:
        raise ConfigError("nothing to do: give --output FOLDER, or --prune for the curve alone")
    if request.prune and not _needs_tokens(request):
        raise ConfigError("--prune measures perplexity, which needs data; drop --no-tokenizer")
    for fraction in (request.keep, *request.prune):
        check_fraction(fraction)
    if request.output is not None:
        refuse_occupied(request.output)


def _needs_tokens(request: ExportRequest) -> bool:
    return request.with_tokenizer or request.data is not None


def _start(request: ExportRequest) -> _Job:
    run = open_run(request.target)
    tokens = tokens_of_run(run, request.data) if _needs_tokens(request) else None
    model = restore_model(
        run,
        device=pick_device(request.device, 0),
        exact=True,
        eos_token_id=None if tokens is None else tokens.eos_token_id,
    )
    length, rows = run.config.model.sequence_length, run.architecture.vocab_size
    ids = comparison_ids(tokens, sequence_length=length, vocab_size=rows)
    trained = compute_logits(model, ids)
    return _Job(request=request, run=run, tokens=tokens, model=model, ids=ids, trained=trained)


def _prune(job: _Job, watch: Watch | None) -> list[PrunedPoint]:
    """Measure the curve, and leave the model pruned as it is to be written."""
    request, config = job.request, job.run.config
    if not request.prune and request.keep == 1.0:
        return []
    prunable = PrunableModel(job.model, find_targets(job.model))
    curve: list[PrunedPoint] = []
    if job.tokens is not None and request.prune:
        loader = ValidationLoader(
            job.tokens,
            sequence_length=config.model.sequence_length,
            num_sequences=EVERYTHING if request.sequences is None else request.sequences,
            micro_batch_size=config.train.micro_batch_size,
        )
        measure = partial(evaluate_model, job.model, loader, precision="fp32", watch=watch)
        curve = pruning_curve(prunable, request.prune, measure)
    prunable.keep(request.keep)
    return curve


def _write(
    job: _Job, output: Path, curve: list[PrunedPoint]
) -> tuple[LogitsDifference, LogitsDifference]:
    """Write the folder and compare what transformers loads from it; see ExportResult."""
    request, model = job.request, job.model
    device = next(model.parameters()).device
    with staged_folder(output) as folder:
        with quiet_transformers():
            write_model(model, folder, dtype=DTYPES[request.dtype])
        if request.with_tokenizer and job.tokens is not None:
            require_undamaged_tokenizer(job.tokens)
            copy_tokenizer(job.tokens.tokenizer_path, folder)
        expected = _as_written(job)
        loaded = compute_logits(load_folder(folder, device=device, dtype=torch.float32), job.ids)
        stored = compare_logits(expected, loaded)
        require_same(stored, "the folder is not the model that was written")
        against = compare_logits(job.trained, loaded)
        write_record(folder, _record(job, stored, against))
        if curve:
            text = json.dumps([asdict(point) for point in curve], indent=1) + "\n"
            (folder / "pruning.json").write_text(text, encoding="utf-8")
            (folder / "pruning.md").write_text(curve_table(curve), encoding="utf-8")
    return stored, against


def _as_written(job: _Job) -> Tensor:
    """The logits that the folder must give.

    They are the training model's unless pruning or bf16 changed the weights.
    """
    if job.request.keep == 1.0 and job.request.dtype == "fp32":
        return job.trained
    for parameter in job.model.parameters():
        parameter.data = parameter.data.float()
    return compute_logits(job.model, job.ids)


def _record(job: _Job, stored: LogitsDifference, trained: LogitsDifference) -> dict[str, Any]:
    return {
        "created_by": f"spectral_scale {__version__}",
        "run": job.run.folder.name,
        "step": job.run.step,
        "method": job.run.config.spectral.method,
        "sequence_length": job.run.config.model.sequence_length,
        "tokenizer_sha256": job.run.tokenizer_sha256,
        "dtype": job.request.dtype,
        "keep": job.request.keep,
        "logits": {"stored": asdict(stored), "trained": asdict(trained)},
    }
