"""The learning rate of every parameter group, made in one place: peak x schedule x ramp."""

from collections.abc import Callable

import torch

from spectral_scale.config.schema import OptimizerConfig
from spectral_scale.optim.groups import group_kind
from spectral_scale.optim.schedules import lr_factor


def no_ramp() -> float:
    """The ramp of a method that never swaps anything."""
    return 1.0


class LearningRates:
    """Sets each group's `lr` before a step; the optimizer and the log read it there.

    Args:
        optimizer: the optimizer that steps; its groups carry `name`, `base_lr` and `spectral`.
        config: the schedule.
        total_steps: the steps of the whole run.
        ramp: the method's factor on spectral groups in the next step, below 1 after a swap.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        *,
        total_steps: int,
        ramp: Callable[[], float] = no_ramp,
    ) -> None:
        self._optimizer, self._config = optimizer, config
        self._total_steps, self._ramp = total_steps, ramp

    def set_for_step(self, applied_steps: int) -> None:
        """Set the learning rates of the next step.

        Args:
            applied_steps: steps applied before it; skipped steps do not advance the schedule.
        """
        schedule, ramp = lr_factor(self._config, applied_steps, self._total_steps), self._ramp()
        for group in self._optimizer.param_groups:
            # From left to right: another order rounds differently.
            group["lr"] = group["base_lr"] * schedule * (ramp if group["spectral"] else 1.0)

    def metrics(self) -> dict[str, float]:
        """The learning rates of the latest step, by metric path."""
        values: dict[str, float] = {}
        for group in self._optimizer.param_groups:
            values[f"train/lr/{group_kind(group['name'])}"] = group["lr"]
        if "train/lr/dense" in values:
            values["train/lr"] = values["train/lr/dense"]
        return values
