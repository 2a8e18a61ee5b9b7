"""The optimizer of a run, and its state, created up front."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from spectral_scale.config.schema import OptimizerConfig


@runtime_checkable
class OwnState(Protocol):
    """An optimizer some of whose parameters have another state than AdamW's."""

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """State of a parameter of a group before the first step; `step` is a part of it."""

    def kept_apart(self) -> Iterable[Tensor]:
        """State that the optimizer keeps on this rank besides `state`."""


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over `groups`, without state yet."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def obeys_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer can leave a step out on the device: torch's fused AdamW can."""
    groups = optimizer.param_groups
    return type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in groups)


@contextmanager
def flag_given(optimizer: Any, left_out: Tensor | None) -> Iterator[None]:
    """Inside, a step of the optimizer is left out if the flag is 1: weights, moments and step
    counts keep every bit. Nothing waits for its value.

    The fused kernels read the flag as torch's GradScaler gives it to them.

    Args:
        optimizer: one that `obeys_flag`.
        left_out: float32, 0-dim, on the parameters' device; None: the step is taken.
    """
    if left_out is None:
        yield
        return
    optimizer.found_inf = left_out
    try:
        yield
    finally:
        del optimizer.found_inf


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give an AdamW its exp_avg, exp_avg_sq and step, of each parameter's own kind and placement.

    State before the first step makes checkpoints symmetric across ranks and lets the first
    swap reset what it expects to reset. An optimizer that has state already is left alone.
    """
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = initial_state(optimizer, parameter, group)


def initial_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]
) -> dict[str, Tensor]:
    """AdamW's state of a parameter before the first step, or the optimizer's own."""
    if isinstance(optimizer, OwnState):
        return optimizer.initial_state(parameter, group)
    return adamw_state(parameter)


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """Zero moments and a count, on the parameter's device."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All state on this rank."""
    apart = optimizer.kept_apart() if isinstance(optimizer, OwnState) else ()
    return [value for state in optimizer.state.values() for value in state.values()] + list(apart)
