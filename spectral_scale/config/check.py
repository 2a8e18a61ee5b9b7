"""Cross-field rules of a configuration, checked before anything is started. No torch here."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from spectral_scale.config.capability import data_parallel_size, refusals
from spectral_scale.config.filter_rules import filter_problems
from spectral_scale.config.presets import Architecture, linear_shapes, resolve_architecture
from spectral_scale.config.rules_megatron import megatron_run_problems
from spectral_scale.config.rules_tensor_parallel import tensor_parallel_problems
from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.errors import ConfigError

CONVERTING = ("sst", "lora", "relora", "frod")
"""Methods that put layers of their own in the place of linears."""
AT_LEAST_ONE = (
    "model.hidden_size",
    "model.num_layers",
    "model.num_heads",
    "model.ffn_size",
    "model.sequence_length",
    "spectral.spectral_rank",
    "spectral.steps_per_iteration",
    "optimizer.decay_steps",
    "data.validation_sequences",
    "data.examples",
    "train.steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.eval_interval",
    "checkpoint.interval",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "metrics.log_interval",
    "health.spike_window",
)
"""Counts."""
AT_LEAST_ZERO = (
    "spectral.extra_sigma",
    "spectral.iteration_warmup_steps",
    "optimizer.lr",
    "optimizer.spectral_lr",
    "optimizer.value_lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_grad_norm",
    "optimizer.warmup_steps",
    "data.num_workers",
    "train.max_starts_without_progress",
    "health.spike_sigmas",
    "health.rollback_after",
    "health.max_rollbacks",
    "health.replica_interval",
    "health.hang_timeout_seconds",
)
"""Amounts and counts of which there may be none."""
POSITIVE = (
    "spectral.ridge",
    "spectral.lora_alpha",
    "optimizer.galore_scale",
    "train.time_limit_minutes",
)
"""Amounts."""


def check_config(config: RunConfig, *, world_size: int) -> Architecture:
    """Raise one ConfigError that lists every broken rule; return the model's shapes if none is."""
    data_ranks = data_parallel_size(config.parallel, world_size)
    problems = [*_check_ranges(config), *_check_batches(config, data_ranks)]
    problems += refusals(config, world_size=world_size)
    problems += _frod_run_problems(config)
    try:
        architecture = resolve_architecture(config.model)
        problems += check_spectral(config.spectral, architecture)
        tensor_parallel = config.parallel.tensor_parallel
        problems += tensor_parallel_problems(architecture, tensor_parallel, world_size=world_size)
        problems += megatron_run_problems(config, architecture)
        problems += filter_problems(config, architecture)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("the configuration cannot run:\n  - " + "\n  - ".join(problems))
    return architecture


def gradient_accumulation_steps(config: RunConfig, *, world_size: int) -> int:
    """Forward passes an optimizer step, a rank."""
    ranks = data_parallel_size(config.parallel, world_size)
    return config.train.global_batch_size // (config.train.micro_batch_size * ranks)


def iterations_per_round(spectral: SpectralConfig, smaller_sides: list[int]) -> int:
    """T2: as configured, or ceil(k / r) for the largest k = min(m, n) of the converted matrices."""
    if spectral.iterations_per_round != "auto":
        return spectral.iterations_per_round
    return math.ceil(max(smaller_sides) / spectral.spectral_rank)


def trains_all_sigma(spectral: SpectralConfig) -> bool:
    """Whether every singular value trains, not only those of the active triplets."""
    if spectral.trained_sigma == "auto":
        return spectral.storage == "factored"
    return spectral.trained_sigma == "all"


def _check_ranges(config: RunConfig) -> Iterator[str]:
    def given(keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
        for key in keys:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            if value is not None and value != "auto":
                yield key, value

    for key, count in given(AT_LEAST_ONE):
        if count < 1:
            yield f"{key}={count} must be at least 1"
    for key, number in given(AT_LEAST_ZERO):
        if not (number >= 0 and math.isfinite(number)):
            yield f"{key}={number} must be finite and at least 0"
    for key, number in given(POSITIVE):
        if not (number > 0 and math.isfinite(number)):
            yield f"{key}={number} must be finite and above 0"
    if not 0 < config.spectral.sparsity <= 1:
        yield f"spectral.sparsity={config.spectral.sparsity} must lie in (0, 1]"
    fractions = {
        "model.dropout": config.model.dropout,
        "optimizer.betas[0]": config.optimizer.betas[0],
        "optimizer.betas[1]": config.optimizer.betas[1],
        "optimizer.min_lr_ratio": config.optimizer.min_lr_ratio,
    }
    for key, fraction in fractions.items():
        if not (0 <= fraction < 1 or (fraction == 1 and key.endswith("ratio"))):
            yield f"{key}={fraction} must lie in [0, 1)"


def _check_batches(config: RunConfig, world_size: int) -> Iterator[str]:
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if micro < 1 or total < 1:
        return
    if total % (micro * world_size):
        allowed = [m for m in range(1, total + 1) if total % (m * world_size) == 0]
        multiple = f"set train.global_batch_size to a multiple of {micro * world_size}"
        advice = f"micro_batch_size must be one of {allowed}" if allowed else multiple
        yield (
            f"train.global_batch_size={total} is not divisible by train.micro_batch_size={micro} x "
            f"{world_size} data-parallel ranks; {advice}"
        )


def check_spectral(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    """What is wrong with the method's settings for the model's linear layers, if anything."""
    yield from _check_targets(spectral, architecture)
    if spectral.method not in ("full", "frod"):
        yield from check_spectral_rank(spectral, architecture)
    if spectral.method == "frod":
        yield from _check_frod(spectral, architecture)
    if spectral.method == "sst":
        yield from _check_sst(spectral)
        yield from _check_extra_sigma(spectral, architecture)


def converted_shapes(
    spectral: SpectralConfig, architecture: Architecture
) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear of one block that the method converts."""
    shapes = linear_shapes(architecture)
    return {n: s for n, s in shapes.items() if not spectral.targets or n in spectral.targets}


def _check_targets(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    known = list(linear_shapes(architecture))
    for name in spectral.targets:
        if name not in known:
            yield f"spectral.targets holds {name}, but the blocks' linears are {known}"
    if spectral.method not in CONVERTING and (spectral.targets or not spectral.train_dense):
        key = "targets" if spectral.targets else "train_dense=false"
        yield (
            f"spectral.{key} needs a method that converts linears ({', '.join(CONVERTING)}), not "
            f"spectral.method={spectral.method}; leave it out"
        )


def _frod_run_problems(config: RunConfig) -> Iterator[str]:
    if config.spectral.method == "frod" and config.model.compile:
        yield (
            "model.compile=true was not tried with spectral.method=frod, whose products are sparse "
            "on the CPU; set model.compile=false"
        )


def _check_frod(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    for name, (_, width) in converted_shapes(spectral, architecture).items():
        if math.floor(spectral.sparsity * width * width) < 1:
            yield (
                f"spectral.sparsity={spectral.sparsity:g} selects none of the {width} x {width} "
                f"entries of S of {name}; set it to at least {1 / (width * width):.3g}"
            )
    if architecture.num_layers < 2:
        yield (
            "spectral.method=frod shares a basis between the layers of a kind, and the model has "
            "one block; use lora or sst, or a model with at least 2 blocks"
        )


def check_spectral_rank(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    """What is wrong with the rank for the model's linear layers, if anything."""
    r = spectral.spectral_rank
    for name, (out_features, in_features) in converted_shapes(spectral, architecture).items():
        if r > min(out_features, in_features):
            yield (
                f"spectral.spectral_rank={r} exceeds min(m, n)={min(out_features, in_features)} of "
                f"{name} ({out_features} x {in_features}); lower it to at most that"
            )


def _check_extra_sigma(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    if spectral.extra_sigma and spectral.storage != "residual":
        yield (
            f"spectral.extra_sigma={spectral.extra_sigma} needs spectral.storage=residual: "
            "factored storage trains all singular values; leave it out"
        )
    smallest = min(min(shape) for shape in linear_shapes(architecture).values())
    if spectral.spectral_rank <= smallest < spectral.spectral_rank + spectral.extra_sigma:
        yield (
            f"spectral.spectral_rank={spectral.spectral_rank} + spectral.extra_sigma="
            f"{spectral.extra_sigma} exceed the {smallest} triplets of the smallest matrix; lower "
            "extra_sigma"
        )


def _check_sst(spectral: SpectralConfig) -> Iterator[str]:
    if spectral.iterations_per_round != "auto" and spectral.iterations_per_round < 1:
        yield f"spectral.iterations_per_round={spectral.iterations_per_round} must be at least 1"
    if spectral.trained_sigma == "all" and spectral.storage == "residual":
        yield (
            "spectral.trained_sigma=all needs spectral.storage=factored: in residual storage the "
            "inactive singular values are merged and have no gradient"
        )
