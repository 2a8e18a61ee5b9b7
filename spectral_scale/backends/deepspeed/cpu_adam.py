"""DeepSpeed's Adam for state that rests on the CPU: vectorised, compiled at its first use."""

import logging
import time
from pathlib import Path
from typing import Any, Literal

import torch

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.collective import Collective

logger = logging.getLogger(__name__)

KEY = "zero_force_ds_cpu_optimizer"
"""DeepSpeed's key: true demands this optimizer, false refuses it, "auto" takes it if it builds."""
BUILD_SECONDS = 1800.0
"""A build that has not ended after so long was killed."""


def offloaded_adam(
    deepspeed: Any,
    adamw: torch.optim.AdamW,
    collective: Collective,
    *,
    wanted: bool | Literal["auto"],
) -> torch.optim.Optimizer:
    """DeepSpeedCPUAdam over copies of `adamw`'s groups, or `adamw` itself. Collective.

    It is taken on all ranks or on none. Its sums differ from torch's in the last bits, so a run
    that is resumed with the other one goes on within rounding, not bit for bit.

    Args:
        deepspeed: the package.
        adamw: without state yet.
        collective: all ranks.
        wanted: see `KEY`.

    Raises ConfigError if it is demanded and some rank cannot build it.
    """
    if wanted is False:
        logger.info("optimizer on the CPU: torch's AdamW, as %s=false has it", KEY)
        return adamw
    logger.info("building DeepSpeedCPUAdam; the first time on a machine takes minutes")
    _wait_for_other_build()
    found, problem = None, None
    try:
        found = _build(deepspeed, adamw)
    except (RuntimeError, OSError, ImportError, AttributeError) as error:
        problem = f"DeepSpeedCPUAdam cannot be built: {error.__cause__ or error}"
    agreed = collective.agree(problem, what="optimizer")
    if found is not None and agreed is None:
        logger.info("optimizer on the CPU: DeepSpeedCPUAdam")
        return found
    if wanted is True:
        raise ConfigError(
            f"{KEY}=true, but {agreed}; install a C++ compiler and ninja, or set it to false"
        )
    logger.warning("optimizer on the CPU: torch's AdamW, which is slower, because %s", agreed)
    return adamw


def is_cpu_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether DeepSpeed's op does the updates."""
    return type(optimizer).__name__ == "DeepSpeedCPUAdam"


def forget_powers(optimizer: Any, *_: Any) -> None:
    """Let the op compute its powers of the betas from the step that it is given.

    It multiplies them up from call to call, so that the last bits of an update would depend on
    what the process has done before: a resumed run would not be the undisturbed one. A step
    pre-hook.
    """
    defaults = optimizer.defaults
    optimizer.ds_opt_adam.create_adam(
        optimizer.opt_id,
        defaults["lr"],
        *defaults["betas"],
        defaults["eps"],
        defaults["weight_decay"],
        optimizer.adam_w_mode,
        False,
    )


def _wait_for_other_build() -> None:
    """torch waits for ever for the lock of a build, also of one that was killed."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    if lock.exists():
        logger.warning("another process builds it; if none does, remove %s", lock)
    while lock.exists() and time.time() - _modified(lock) < BUILD_SECONDS:
        time.sleep(0.5)
    if lock.exists():
        logger.warning("removing %s, left by a build that did not end", lock)
        lock.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _build(deepspeed: Any, adamw: torch.optim.AdamW) -> torch.optim.Optimizer:
    defaults = adamw.defaults
    built: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
        [dict(group) for group in adamw.param_groups],
        **{key: defaults[key] for key in ("lr", "betas", "eps", "weight_decay")},
        adamw_mode=True,
    )
    return built
