"""State of the optimizer inside ZeRO: created up front, with one Adam step a flat tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectral_scale.backends.deepspeed.cpu_adam import forget_powers, is_cpu_adam
from spectral_scale.backends.deepspeed.partitions import Layout
from spectral_scale.errors import ConfigError
from spectral_scale.optim.build import OwnState, initial_state


def create_state(inner: torch.optim.Optimizer, layout: Layout) -> None:
    """Give torch's AdamW or DeepSpeedCPUAdam its exp_avg, exp_avg_sq and step, another its own.

    State before the first step makes checkpoints symmetric across ranks and lets the first
    swap reset what it expects to reset. Flat tensors that have state are left alone.
    Raises ConfigError for another optimizer.
    """
    if not isinstance(inner, torch.optim.AdamW | OwnState) and not is_cpu_adam(inner):
        raise ConfigError(
            f"the engine steps {type(inner).__name__}; torch.optim.AdamW and, with offload, "
            "DeepSpeedCPUAdam have been shown to work: give one to deepspeed.initialize, and no "
            "optimizer in its configuration"
        )
    for flat in layout.flats():
        if inner.state.get(flat.tensor):
            continue
        state = inner.state[flat.tensor] = initial_state(inner, flat.tensor, flat.group)
        if is_cpu_adam(inner):
            state["step"] = state["step"].long()


def register_step_hooks(inner: torch.optim.Optimizer) -> None:
    """Let DeepSpeedCPUAdam forget its powers of the betas before each step; see `forget_powers`."""
    if is_cpu_adam(inner):
        inner.register_step_pre_hook(forget_powers)


def set_step(inner: torch.optim.Optimizer, flat: Tensor, value: float) -> None:
    """Overwrite the number of steps that Adam has taken of a flat tensor since the last reset."""
    inner.state[flat]["step"].fill_(value)


@contextmanager
def without_update(inner: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, DeepSpeed goes through a step without changing masters, moments or Adam's steps.

    Its masters are then copied into the module again, which rounds to the same weights.
    """
    stepped: Any = inner
    own = stepped.__dict__.get("step")
    stepped.step = lambda *_, **__: None
    try:
        yield
    finally:
        del stepped.step
        if own is not None:
            stepped.step = own
