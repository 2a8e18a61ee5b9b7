"""The short learning-rate ramp after a swap, as hooks around `optimizer.step`."""

from collections.abc import Callable

import torch

from spectral_scale.errors import ConfigError


def require_spectral_group(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError if no parameter group is marked `spectral`."""
    if not any(group.get("spectral") for group in optimizer.param_groups):
        raise ConfigError(
            "no parameter group of the optimizer is marked spectral; "
            "build the groups with spectral_scale.param_groups(model, ...)"
        )


def ramp_learning_rates(optimizer: torch.optim.Optimizer, factor: Callable[[], float]) -> None:
    """Multiply the lr of groups marked `spectral` by `factor()` inside each `optimizer.step`.

    The groups' own lr is restored after the step, so any scheduler keeps working. Raises
    ConfigError if no group is marked.
    """
    require_spectral_group(optimizer)

    def scale(opt: torch.optim.Optimizer, *_: object) -> None:
        for group in opt.param_groups:
            if group.get("spectral"):
                group["lr_before_ramp"] = group["lr"]
                group["lr"] = group["lr"] * factor()

    def restore(opt: torch.optim.Optimizer, *_: object) -> None:
        for group in opt.param_groups:
            if group.get("spectral"):
                group["lr"] = group.pop("lr_before_ramp")

    optimizer.register_step_pre_hook(scale)
    optimizer.register_step_post_hook(restore)
