"""Checks that a local transformers folder can be trained from, by its logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectral_scale.artifacts.compare import (
    LogitsDifference,
    compare_logits,
    comparison_ids,
    compute_logits,
    require_same,
)
from spectral_scale.artifacts.model_folder import read_record
from spectral_scale.config.presets import Architecture, resolve_architecture
from spectral_scale.config.schema import ModelConfig, SpectralConfig
from spectral_scale.data.tokenizer_match import TokenizerCheck, check_folder_tokenizer
from spectral_scale.data.tokens import TokenFolder, open_tokens
from spectral_scale.engine.data import check_vocabulary
from spectral_scale.errors import ConfigError
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.sst.layer import convert
from spectral_scale.models.build import build_model, materialise
from spectral_scale.models.folder import (
    CONFIG_NAME,
    FolderReport,
    check_folder,
    is_transformers_folder,
    load_folder,
)
from spectral_scale.models.weights import FolderWeights, initialise_dense
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.table import parameter_table

COMPARED_LENGTH = 256
"""Length of the sequences that logits are compared on, if the model has that many positions."""


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What to check."""

    folder: Path
    """A local transformers folder."""
    data: Path | None = None
    """A token folder to compare on, whose tokenizer must be the folder's; None: random ids."""
    spectral_rank: int | None = SpectralConfig.spectral_rank
    """The rank to convert with; None checks the dense model only, without any SVD."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What was found."""

    architecture: Architecture
    """The model's shapes."""
    weights: FolderReport
    """What the folder stores."""
    sequence_length: int
    """The sequence length to train with: the exported run's, else all of the model's positions."""
    compared_on: str
    """Where the tokens of the comparison came from."""
    tokenizer: TokenizerCheck
    """Whether the data's tokenizer was compared with the folder's, and matched."""
    dense: LogitsDifference
    """The model as this package builds it, compared with transformers' own."""
    converted: LogitsDifference | None
    """The model converted to SST, after its SVDs, compared with transformers' own."""
    layers: int
    """The number of matrices converted."""


def check_import(request: ImportRequest) -> ImportResult:
    """Build the model as training would and compare its logits with transformers' own.

    Raises ConfigError for a folder that cannot be used (weights incomplete, of another shape,
    pickled or quantised; an unsupported architecture) and SpectralScaleError if logits differ.
    """
    _require_folder(request.folder)
    # The length is not used: positions come from the folder. One token is valid for any model.
    config = ModelConfig(path=str(request.folder), sequence_length=1)
    architecture = resolve_architecture(config)
    model = build_model(architecture, config, eos_token_id=None)
    weights = check_folder(request.folder, model)
    tokens, tokenizer = _open_data(request, architecture)
    ids = comparison_ids(
        tokens,
        sequence_length=min(COMPARED_LENGTH, architecture.max_positions),
        vocab_size=architecture.vocab_size,
    )
    device = pick_device(request.device, 0)
    reference = compute_logits(load_folder(request.folder, device=device, dtype=torch.float32), ids)
    dense = _compare_dense(model, request.folder, device, ids, reference)
    converted, layers = _compare_converted(model, request.spectral_rank, ids, reference)
    trained_length = read_record(request.folder).get("sequence_length")
    return ImportResult(
        architecture=architecture,
        weights=weights,
        sequence_length=int(trained_length or architecture.max_positions),
        compared_on="random token ids" if tokens is None else str(tokens.path),
        tokenizer=tokenizer,
        dense=dense,
        converted=converted,
        layers=layers,
    )


def _require_folder(folder: Path) -> None:
    if is_transformers_folder(folder):
        return
    if (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is a run folder; continue it with `train`, or `export` it and import that"
        )
    raise ConfigError(
        f"{folder} is no transformers folder (no {CONFIG_NAME}); give one that save_pretrained or "
        "`spectral-scale export` wrote, or a downloaded model; nothing is fetched from the hub"
    )


def _open_data(
    request: ImportRequest, architecture: Architecture
) -> tuple[TokenFolder | None, TokenizerCheck]:
    if request.data is None:
        return None, "not checked"
    tokens = open_tokens(request.data)
    check_vocabulary(architecture.vocab_size, tokens)
    return tokens, check_folder_tokenizer(request.folder, tokens)


def _compare_dense(
    model: PreTrainedModel, folder: Path, device: torch.device, ids: Tensor, reference: Tensor
) -> LogitsDifference:
    """Give the meta model the folder's weights, in place, as training does."""
    table = parameter_table(model)
    materialise(model, device=device, dtype=torch.float32)
    initialise_dense(model, table, FolderWeights(folder))
    difference = compare_logits(reference, compute_logits(model, ids))
    require_same(difference, f"{folder} as built here is not the model transformers loads")
    return difference


def _compare_converted(
    model: PreTrainedModel, spectral_rank: int | None, ids: Tensor, reference: Tensor
) -> tuple[LogitsDifference | None, int]:
    """Convert the dense model, in place, and decompose every matrix."""
    if spectral_rank is None:
        return None, 0
    config = SpectralConfig(spectral_rank=spectral_rank)
    layers = convert(model, config)
    SpectralController(model, None, config)
    difference = compare_logits(reference, compute_logits(model, ids))
    require_same(difference, "the model converted to SST is not the dense one")
    return difference, len(layers)
