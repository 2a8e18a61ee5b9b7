"""Cross-field rules of a configuration, checked before anything is started. No torch here."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from spectral_scale.config.capability import CAPABILITIES, data_parallel_size, refusals
from spectral_scale.config.filter_rules import filter_problems
from spectral_scale.config.methods import METHOD_SPECS, chosen_spec
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.presets import Architecture, linear_shapes, resolve_architecture
from spectral_scale.config.rules_megatron import megatron_run_problems
from spectral_scale.config.rules_tensor_parallel import tensor_parallel_problems
from spectral_scale.config.schema import FilterConfig, RunConfig, SpectralConfig
from spectral_scale.config.support import Support
from spectral_scale.errors import ConfigError

AT_LEAST_ONE = (
    "model.hidden_size",
    "model.num_layers",
    "model.num_heads",
    "model.ffn_size",
    "model.max_positions",
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
"""Keys of counts, which must be at least 1 where they are set."""
AT_LEAST_ZERO = (
    "spectral.extra_sigma",
    "spectral.iteration_warmup_steps",
    "optimizer.lr",
    "optimizer.spectral_lr",
    "optimizer.value_lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.spectral_weight_decay",
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
"""Keys of amounts and counts, which must be finite and may be 0."""
POSITIVE = (
    "spectral.ridge",
    "spectral.lora_alpha",
    "optimizer.galore_scale",
    "train.time_limit_minutes",
)
"""Keys of amounts, which must be finite and above 0."""
OPTIMIZER_KEYS = {
    "muon": frozenset({"optimizer.muon_momentum", "optimizer.spectral_lr"}),
    "scale": frozenset({"optimizer.spectral_lr"}),
}
"""Keys that every run with an optimizer uses, whatever its method."""


def check_config(
    config: RunConfig,
    *,
    world_size: int,
    methods: Mapping[str, MethodSpec] = METHOD_SPECS,
    capabilities: Mapping[str, Mapping[str, Support]] = CAPABILITIES,
) -> Architecture:
    """Raise one ConfigError that lists every broken rule; return the model's shapes if none is.

    Rules that need the model's shapes are left out if the model itself is at fault: its error is
    then one of the list.
    """
    spec = chosen_spec(config.spectral, methods)
    data_ranks = data_parallel_size(config.parallel, world_size)
    problems = [*_check_ranges(config), *_check_batches(config, data_ranks)]
    if config.train.tf32 and config.train.precision != "fp32":
        problems.append(
            f"train.tf32=true has no effect on train.precision={config.train.precision}; leave it "
            "out, or set train.precision=fp32"
        )
    if config.optimizer.name == "scale" and (spec.converts or not spec.muon):
        problems.append(
            "optimizer.name=scale trains the matrices of spectral.method=full, and not what "
            f"{spec.title} trains; set optimizer.name=adamw"
        )
    if config.optimizer.name == "muon" and not spec.muon:
        problems.append(
            "optimizer.name=muon trains the factors of spectral.form=tangent and the matrices of "
            f"spectral.method=full, and not what {spec.title} trains; set optimizer.name=adamw"
        )
    problems += refusals(config, spec, capabilities, world_size=world_size)
    problems += spec.run_problems(config)
    try:
        architecture = resolve_architecture(config.model)
        problems += check_spectral(config.spectral, architecture, spec)
        tensor_parallel = config.parallel.tensor_parallel
        problems += tensor_parallel_problems(architecture, tensor_parallel, world_size=world_size)
        problems += megatron_run_problems(config, architecture)
        problems += filter_problems(config, architecture, spec)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("the configuration cannot run:\n  - " + "\n  - ".join(problems))
    return architecture


def gradient_accumulation_steps(config: RunConfig, *, world_size: int) -> int:
    """Forward passes an optimizer step, a rank."""
    ranks = data_parallel_size(config.parallel, world_size)
    return config.train.global_batch_size // (config.train.micro_batch_size * ranks)


def _check_ranges(config: RunConfig) -> Iterator[str]:
    def given(keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
        for key in keys:
            value = _get(config, key)
            # None and auto are no numbers: nothing was set.
            if value is not None and value != "auto":
                yield key, value

    for key, count in given(AT_LEAST_ONE):
        if count < 1:
            yield f"{key}={count} must be at least 1"
    # NaN is neither at least 0 nor below it; asked this way round, it is refused.
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
        "optimizer.muon_momentum": config.optimizer.muon_momentum,
        "optimizer.min_lr_ratio": config.optimizer.min_lr_ratio,
    }
    # A ratio of 1 is a learning rate that never falls; a dropout or a beta of 1 has no meaning.
    for key, fraction in fractions.items():
        if not (0 <= fraction < 1 or (fraction == 1 and key.endswith("ratio"))):
            yield f"{key}={fraction} must lie in [0, 1)"


def _check_batches(config: RunConfig, world_size: int) -> Iterator[str]:
    """The micro-batches of an optimizer step must be equally many on all data-parallel ranks.

    12 sequences on 2 ranks are 6 a rank: micro-batches of 1, 2, 3 or 6, but not of 4. If the ranks
    do not divide the global batch, no size fits, and the advice is to change the global batch.
    """
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if micro < 1 or total < 1:  # reported as out of range
        return
    if total % (micro * world_size):
        allowed = [m for m in range(1, total + 1) if total % (m * world_size) == 0]
        multiple = f"set train.global_batch_size to a multiple of {micro * world_size}"
        advice = f"micro_batch_size must be one of {allowed}" if allowed else multiple
        yield (
            f"train.global_batch_size={total} is not divisible by train.micro_batch_size={micro} x "
            f"{world_size} data-parallel ranks; {advice}"
        )


def check_spectral(
    spectral: SpectralConfig,
    architecture: Architecture,
    spec: MethodSpec,
) -> Iterator[str]:
    """What is wrong with the method's settings for the model's linear layers, if anything."""
    yield from _check_targets(spectral, architecture, spec)
    yield from spec.problems(spectral, architecture)


def _check_targets(
    spectral: SpectralConfig, architecture: Architecture, spec: MethodSpec
) -> Iterator[str]:
    known = list(linear_shapes(architecture))
    for name in spectral.targets:
        if name not in known:
            yield f"spectral.targets holds {name}, but the blocks' linears are {known}"
    if not spec.converts and (spectral.targets or not spectral.train_dense):
        key = "targets" if spectral.targets else "train_dense=false"
        converting = ", ".join(
            s.name for s in METHOD_SPECS.values() if s.converts and not s.chosen_by
        )
        yield (
            f"spectral.{key} needs a method that converts linears ({converting}), not "
            f"spectral.method={spectral.method}; leave it out"
        )
    if spectral.train_also and spectral.train_dense:
        yield (
            f"spectral.train_also={spectral.train_also} needs spectral.train_dense=false: "
            "otherwise all parameters train; leave it out, or freeze the rest"
        )


def keys_without_effect(config: RunConfig) -> list[str]:
    """Keys that differ from their defaults although `spectral.method`, or a filter that is off,
    does not use them.

    They are no error, so that one file can serve several methods; a run names them at its start.
    """
    used = chosen_spec(config.spectral).keys
    used |= OPTIMIZER_KEYS.get(config.optimizer.name, frozenset())
    own = frozenset().union(*OPTIMIZER_KEYS.values())
    known = sorted(own.union(*(spec.keys for spec in METHOD_SPECS.values())))
    if not config.filter.enabled:
        known += [f"filter.{field.name}" for field in fields(FilterConfig)]
    default = RunConfig()
    return [key for key in known if key not in used and _get(config, key) != _get(default, key)]


def _get(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
