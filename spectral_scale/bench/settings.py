"""Settings of `bench step`. This module does not import torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from spectral_scale.config.methods.rules import rank_problems
from spectral_scale.config.presets import PRESETS, Architecture, resolve_architecture
from spectral_scale.config.schema import ModelConfig, RunConfig, SpectralConfig, TrainConfig
from spectral_scale.errors import ConfigError

Variant = Literal["dense", "sst residual", "sst int8", "sst factored", "tangent"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
CHANGES: dict[Variant, dict[str, Any]] = {
    "dense": {"method": "full"},
    "sst residual": {"storage": "residual"},
    "sst int8": {"storage": "residual", "residual_dtype": "int8"},
    "sst factored": {"storage": "factored"},
    "tangent": {"form": "tangent"},
}
"""Variant -> settings of the spectral section that it stands for."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """One run of the benchmark."""

    model: str = "opt-1.3b"
    """A preset, or a local transformers folder."""
    blocks: int | None = None
    """Transformer blocks; None: 1, or all of a whole model."""
    whole_model: bool = False
    """Whether to measure embeddings, final norm, head and loss as well, not the blocks alone."""
    batch_size: int = 1
    """Sequences a step."""
    sequence_length: int = 512
    """Tokens a sequence."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision, as `train.precision`: bf16 keeps trained weights in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the step."""
    threads: int = 1
    """Threads of one operation on the CPU."""
    spectral_rank: int = 64
    """r of every form of SST."""
    steps: int = 7
    """Timed steps of each variant."""
    warmup_steps: int = 2
    """Untimed steps of each variant before."""
    steps_per_iteration: int = 200
    """T3, the number of steps over which the time of a swap is spread."""
    variants: tuple[Variant, ...] = VARIANTS
    """What is measured; the first is dense, with which the others are compared."""
    swaps: bool = True
    """Measure swaps, too; their decompositions take minutes for a large model."""


def architecture_of(settings: StepSettings) -> Architecture:
    """The model's shapes. Raises ConfigError for settings that cannot run."""
    architecture = resolve_architecture(model_config(settings))
    spectral = SpectralConfig(spectral_rank=settings.spectral_rank)
    for problem in rank_problems(spectral, architecture):
        raise ConfigError(problem)
    if num_blocks(settings, architecture) > architecture.num_layers:
        raise ConfigError(
            f"--blocks {settings.blocks} given, {settings.model} has {architecture.num_layers}"
        )
    taken = settings.warmup_steps + settings.steps
    if taken >= settings.steps_per_iteration:
        raise ConfigError(
            f"{taken} steps given with the warm-up, fewer than --steps-per-iteration "
            f"{settings.steps_per_iteration} required: no swap may fall among timed steps"
        )
    return architecture


def num_blocks(settings: StepSettings, architecture: Architecture) -> int:
    """Transformer blocks that are measured."""
    if settings.blocks is not None:
        return settings.blocks
    return architecture.num_layers if settings.whole_model else 1


def model_config(settings: StepSettings) -> ModelConfig:
    """The `model` section of a run of these settings."""
    name = settings.model
    is_folder = name not in PRESETS and Path(name).is_dir()
    model = ModelConfig(name=None, path=name) if is_folder else ModelConfig(name=name)
    return replace(model, sequence_length=settings.sequence_length)


def run_config(settings: StepSettings, variant: Variant) -> RunConfig:
    """The run whose step `variant` is, with the defaults of training in everything not measured."""
    spectral = SpectralConfig(
        **CHANGES[variant],
        spectral_rank=settings.spectral_rank,
        steps_per_iteration=settings.steps_per_iteration,
    )
    train = TrainConfig(
        precision=settings.dtype,
        device=settings.device,
        global_batch_size=settings.batch_size,
        micro_batch_size=settings.batch_size,
    )
    return RunConfig(model=model_config(settings), spectral=spectral, train=train)
