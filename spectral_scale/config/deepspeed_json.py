"""A DeepSpeed JSON beside the run's configuration: one of them says each number.

`"auto"` takes the run's value, another value must be equal to it; DeepSpeed's own keys are handed
on, and what would break the method is refused with the reason. No torch and no deepspeed here.
"""

import difflib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spectral_scale.config.capability import zero_stage
from spectral_scale.config.check import gradient_accumulation_steps
from spectral_scale.config.deepspeed_keys import PASSED_ON, PASSED_ON_SECTIONS, REFUSED
from spectral_scale.config.methods import chosen_spec
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.files.json_text import parse_json

logger = logging.getLogger(__name__)

STAGE = "zero_optimization.stage"
OFFLOAD = "zero_optimization.offload_optimizer.device"
OFFLOAD_WEIGHTS = "zero_optimization.offload_param.device"
CPU_ADAM = "zero_force_ds_cpu_optimizer"
"""Whether DeepSpeedCPUAdam steps offloaded state; "auto": where it can be built."""
SMALLEST_BUCKET = 2**20
DYNAMIC_LOSS_SCALE = {
    "fp16.loss_scale": 0,
    "fp16.initial_scale_power": 16,
    "fp16.loss_scale_window": 1000,
    "fp16.hysteresis": 2,
    "fp16.min_loss_scale": 1,
}
"""DeepSpeed's own defaults: the scale doubles after `loss_scale_window` steps without overflow."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What DeepSpeed is started with."""

    initialize: dict[str, Any]
    """The `config` argument of `deepspeed.initialize`; every "auto" in it is a value."""
    cpu_adam: bool | Literal["auto"]
    """The file's `zero_force_ds_cpu_optimizer`, which `initialize` leaves off: the backend builds
    that optimizer by itself."""


def with_deepspeed_json(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """Take over the ZeRO stage and the offload that the DeepSpeed file names.

    Args:
        config: a run on DeepSpeed.
        given: what `read_deepspeed_json` returns for its `parallel.deepspeed_config`.

    Raises:
        ConfigError: the file names a stage that does not exist.
    """
    parallel = config.parallel
    stage, offload = given.get(STAGE, "auto"), given.get(OFFLOAD, "auto")
    if parallel.zero_stage == "auto" and stage != "auto":
        if stage not in (0, 1, 2, 3):
            raise ConfigError(
                f"{parallel.deepspeed_config}: {STAGE}={stage!r} must be 0, 1, 2 or 3"
            )
        parallel = replace(parallel, zero_stage=stage)
    if parallel.offload == "none" and offload == "cpu":
        parallel = replace(parallel, offload="cpu")
    return replace(config, parallel=parallel)


def resolve_deepspeed(
    config: RunConfig, given: Mapping[str, Any], architecture: Architecture, *, world_size: int
) -> DeepSpeedSettings:
    """Settle every key of the DeepSpeed file against the run.

    DeepSpeed's own clipping is switched off: kinds of parameter groups are clipped by themselves.

    Args:
        config: a run on DeepSpeed, from `with_deepspeed_json`.
        given: the file's keys, from `read_deepspeed_json`.
        architecture: the model's shapes, which bucket sizes follow.
        world_size: ranks of the run.

    Raises:
        ConfigError: lists every key of the file that contradicts the run or is refused.
    """
    path = config.parallel.deepspeed_config
    common = _common(config, world_size)
    problems = [*_contradictions(given, common), *_refusals(given)]
    if given.get("flops_profiler.enabled") is True and zero_stage(config.parallel) == 3:
        problems.append(
            "flops_profiler.enabled=true is refused in stage 3: it runs on rank 0 alone, whose "
            "gathers of weights then no longer match those of other ranks; profile in stage 2"
        )
    if given.get(CPU_ADAM) is True and chosen_spec(config.spectral).own_optimizer:
        problems.append(
            f"{CPU_ADAM}=true is refused with spectral.method={config.spectral.method}, whose "
            'optimizer is its own; set it to false or "auto"'
        )
    if problems:
        raise ConfigError(f"{path} does not fit the run:\n  - " + "\n  - ".join(problems))
    _warn_unknown(given, common, path)
    passed = {k: v for k, v in given.items() if k in PASSED_ON or _section(k) in PASSED_ON_SECTIONS}
    concrete = {k: v for k, v in passed.items() if v != "auto"}
    initialize = _nested(_defaults(config, architecture) | concrete | _fixed(config, common))
    return DeepSpeedSettings(initialize=initialize, cpu_adam=given.get(CPU_ADAM, "auto"))


def read_deepspeed_json(path: str | None) -> dict[str, Any]:
    """The file's keys with dots and their values; none for no file. Raises ConfigError."""
    if path is None:
        return {}
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"parallel.deepspeed_config={path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"parallel.deepspeed_config={path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"parallel.deepspeed_config={path} must hold one JSON object")
    return dict(_flat(value))


def _common(config: RunConfig, world_size: int) -> dict[str, tuple[str, Any]]:
    """Key of the JSON -> (what says it in the run, value)."""
    train, optimizer = config.train, config.optimizer
    accumulation = gradient_accumulation_steps(config, world_size=world_size)
    stage, offload = zero_stage(config.parallel), config.parallel.offload
    common: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": (
            f"train.global_batch_size / (train.micro_batch_size x {world_size} ranks)",
            accumulation,
        ),
        "gradient_clipping": ("optimizer.clip_grad_norm", optimizer.clip_grad_norm),
        "bf16.enabled": ("train.precision", train.precision == "bf16"),
        "fp16.enabled": ("train.precision", train.precision == "fp16"),
        STAGE: ("parallel.zero_stage", stage),
        OFFLOAD: ("parallel.offload", offload),
        OFFLOAD_WEIGHTS: ("parallel.offload", offload if stage == 3 else "none"),
        "optimizer.type": ("optimizer.name", "AdamW"),
        "optimizer.params.lr": ("optimizer.lr", optimizer.lr),
        "optimizer.params.betas": ("optimizer.betas", list(optimizer.betas)),
        "optimizer.params.eps": ("optimizer.eps", optimizer.eps),
        "optimizer.params.weight_decay": ("optimizer.weight_decay", optimizer.weight_decay),
    }
    return common


def _defaults(config: RunConfig, architecture: Architecture) -> dict[str, Any]:
    """This project's values of keys that the file may set."""
    width = architecture.hidden_size
    defaults: dict[str, Any] = {
        "steps_per_print": 2**31,
        "zero_optimization.reduce_bucket_size": max(width * width, SMALLEST_BUCKET),
        # Stage 3 reduces on a stream of its own, as DeepSpeed does by default. In stages 1 and 2 it
        # takes a second bucket, and data races have been reported (DeepSpeed issues 5545, 8061).
        "zero_optimization.overlap_comm": zero_stage(config.parallel) == 3,
    }
    if zero_stage(config.parallel) == 3:
        defaults |= {
            "zero_optimization.stage3_prefetch_bucket_size": max(width * width, SMALLEST_BUCKET),
            "zero_optimization.stage3_param_persistence_threshold": 10 * width,
        }
    if config.train.precision == "fp16":
        defaults |= DYNAMIC_LOSS_SCALE
    if config.train.precision != "fp32":
        defaults |= {"data_types.grad_accum_dtype": "fp32", "communication_data_type": "fp32"}
    return defaults


def _fixed(config: RunConfig, common: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Values that the run or the backend decides, whatever the file says."""
    own = {k: v for k, (_, v) in common.items() if not k.startswith("optimizer.")}
    if config.parallel.offload == "none":
        own = {k: v for k, v in own.items() if k not in (OFFLOAD, OFFLOAD_WEIGHTS)}
    elif zero_stage(config.parallel) != 3:
        own.pop(OFFLOAD_WEIGHTS)
    return own | {
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization.round_robin_gradients": False,
    }


def _contradictions(given: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[str]:
    for key, (source, value) in common.items():
        found = given.get(key, "auto")
        if found != "auto" and not _equal(found, value):
            yield (
                f"{key}={json.dumps(found)} differs from {json.dumps(value)}, given by {source}; "
                'set "auto" in the JSON, or make them equal'
            )


def _equal(found: Any, value: Any) -> bool:
    numbers = (int, float)
    if isinstance(found, bool) or isinstance(value, bool):
        return found is value
    if isinstance(found, numbers) and isinstance(value, numbers):
        return math.isclose(found, value, rel_tol=1e-9)
    if isinstance(found, str) and isinstance(value, str):
        return found.lower() == value.lower()
    return bool(found == value)


def _refusals(given: Mapping[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        for refused, (harmless, reason) in REFUSED.items():
            inside = key == refused or key.startswith(f"{refused}.")
            if inside and value not in (*harmless, "auto") and not _switched_off(key, value):
                yield f"{key}={json.dumps(value)} is refused: {reason}"
    if given.get(CPU_ADAM, "auto") not in (True, False, "auto"):
        yield f'{CPU_ADAM}={json.dumps(given[CPU_ADAM])} must be true, false or "auto"'
    for key in (OFFLOAD, OFFLOAD_WEIGHTS):
        if given.get(key) == "nvme":
            yield f"{key}=nvme is refused: no test has shown it; use cpu"


def _switched_off(key: str, value: Any) -> bool:
    return key.endswith(".enabled") and value is False


def _warn_unknown(given: Mapping[str, Any], common: Mapping[str, Any], path: str | None) -> None:
    known = [*PASSED_ON, *common, *REFUSED]
    for key in given:
        refused = any(key == r or key.startswith(f"{r}.") for r in REFUSED)
        if key in known or refused or _section(key) in PASSED_ON_SECTIONS:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; the nearest known one is {near[0]}" if near else ""
        logger.warning("%s: %s is not known here and has no effect%s", path, key, hint)


def _section(key: str) -> str:
    return key.partition(".")[0]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        elif not isinstance(item, dict):
            yield f"{prefix}{key}", item


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in sorted(flat.items()):
        *sections, leaf = key.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return result
