"""Measures the perplexity of a saved run or a transformers folder on any prepared data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from spectral_scale.artifacts.model_folder import read_record
from spectral_scale.artifacts.restore import open_run, restore_model
from spectral_scale.artifacts.run_tokens import tokens_of_run
from spectral_scale.config.presets import Architecture, resolve_architecture
from spectral_scale.config.schema import ModelConfig
from spectral_scale.data.loader import ValidationLoader
from spectral_scale.data.tokenizer_match import TokenizerCheck, check_folder_tokenizer
from spectral_scale.data.tokens import TokenFolder, open_tokens
from spectral_scale.engine.build import PRODUCT_DTYPES
from spectral_scale.engine.data import check_vocabulary
from spectral_scale.engine.evaluate import Evaluation, Watch, evaluate
from spectral_scale.errors import ConfigError
from spectral_scale.models.folder import is_transformers_folder, load_folder
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.device import pick_device

Precision = Literal["auto", "fp32", "bf16"]
DEFAULT_BATCH_SIZE = 8
EVERYTHING = 1 << 62
"""More sequences than any folder holds: the loader takes what there is."""


@dataclass(frozen=True, kw_only=True)
class PerplexityRequest:
    """What to measure."""

    target: Path
    """A run folder, one of its checkpoints, or a transformers folder."""
    data: Path | None = None
    """A token folder; None: the run's validation data."""
    sequences: int | None = None
    """Largest number of sequences to read, spread evenly over the data; None reads all of it."""
    sequence_length: int | None = None
    """Tokens in a sequence; None takes the run's length, or all positions of a foreign folder."""
    batch_size: int | None = None
    """Sequences in a forward pass; None takes the run's number, or 8."""
    precision: Precision = "auto"
    """Auto takes the run's own, which reproduces its logged validation loss exactly, or fp32."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured, and on what."""

    target: str
    """The target as it was given."""
    step: int | None
    """The step of the checkpoint; None for a transformers folder that does not say."""
    data: str
    """The token folder."""
    tokenizer: TokenizerCheck
    """Whether the target's tokenizer was compared with the data's, and matched."""
    sequence_length: int
    """Tokens in a sequence."""
    sequences: int
    """The number of sequences read."""
    tokens: int
    """The number of tokens predicted."""
    precision: str
    """fp32, bf16, fp16 or fp64."""
    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    """The exponential of the loss."""


@dataclass(frozen=True, kw_only=True)
class _MeasuredModel:
    """A model ready to be measured."""

    model: PreTrainedModel
    tokens: TokenFolder
    tokenizer: TokenizerCheck
    sequence_length: int
    batch_size: int
    precision: str
    step: int | None


def measure_perplexity(request: PerplexityRequest, watch: Watch | None = None) -> Perplexity:
    """Load the target and run it over the data. Raises ConfigError, DataError, CheckpointError."""
    device = pick_device(request.device, 0)
    if is_transformers_folder(request.target):
        measured = _open_folder(request, device)
    else:
        measured = _open_run_model(request, device)
    loader = ValidationLoader(
        measured.tokens,
        sequence_length=measured.sequence_length,
        num_sequences=EVERYTHING if request.sequences is None else request.sequences,
        micro_batch_size=measured.batch_size,
    )
    result = evaluate_model(measured.model, loader, precision=measured.precision, watch=watch)
    return Perplexity(
        target=str(request.target),
        step=measured.step,
        data=str(measured.tokens.path),
        tokenizer=measured.tokenizer,
        sequence_length=measured.sequence_length,
        sequences=loader.num_sequences,
        tokens=result.tokens,
        precision=measured.precision,
        loss=result.loss,
        perplexity=result.perplexity,
    )


def evaluate_model(
    model: PreTrainedModel, loader: ValidationLoader, *, precision: str, watch: Watch | None = None
) -> Evaluation:
    """Evaluate in this process alone, on the model's device."""
    return evaluate(
        model,
        loader,
        device=next(model.parameters()).device,
        collective=SingleProcess(),
        autocast=PRODUCT_DTYPES.get(precision),
        watch=watch,
    )


def _open_run_model(request: PerplexityRequest, device: torch.device) -> _MeasuredModel:
    run = open_run(request.target)
    tokens = tokens_of_run(run, request.data)
    trained = run.config.train.precision
    precision = trained if request.precision == "auto" else request.precision
    model = restore_model(run, device=device, exact=precision not in PRODUCT_DTYPES)
    if precision != "fp64":
        # A run in double precision, measured in another: its weights are still double.
        for parameter in model.parameters():
            if parameter.dtype == torch.float64:
                parameter.data = parameter.data.float()
    return _MeasuredModel(
        model=model,
        tokens=tokens,
        tokenizer="same",
        sequence_length=_sequence_length(
            request, run.config.model.sequence_length, run.architecture
        ),
        batch_size=request.batch_size or run.config.train.micro_batch_size,
        precision=precision,
        step=run.step,
    )


def _open_folder(request: PerplexityRequest, device: torch.device) -> _MeasuredModel:
    folder = request.target
    if request.data is None:
        raise ConfigError(f"{folder} is a transformers folder; give --data FOLDER to measure it on")
    architecture = resolve_architecture(ModelConfig(path=str(folder), sequence_length=1))
    record = read_record(folder)
    tokens = open_tokens(request.data)
    checked = check_folder_tokenizer(folder, tokens)
    check_vocabulary(architecture.vocab_size, tokens)
    default = int(record.get("sequence_length", architecture.max_positions))
    return _MeasuredModel(
        model=load_folder(folder, device=device, dtype=torch.float32),
        tokens=tokens,
        tokenizer=checked,
        sequence_length=_sequence_length(request, default, architecture),
        batch_size=request.batch_size or DEFAULT_BATCH_SIZE,
        precision="fp32" if request.precision == "auto" else request.precision,
        step=record.get("step"),
    )


def _sequence_length(request: PerplexityRequest, default: int, architecture: Architecture) -> int:
    length = request.sequence_length or default
    if length > architecture.max_positions:
        raise ConfigError(
            f"--sequence-length {length} exceeds the model's {architecture.max_positions} positions"
        )
    return length
