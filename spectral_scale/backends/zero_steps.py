"""State of the optimizer inside ZeRO: created up front, with one Adam step a flat tensor."""

import torch
from torch import Tensor

from spectral_scale.backends.zero_layout import Layout


def create_state(inner: torch.optim.Optimizer, layout: Layout) -> None:
    """Give an AdamW or DeepSpeedCPUAdam its exp_avg, exp_avg_sq and step.

    State before the first step makes checkpoints symmetric across ranks and lets the first
    boundary reset what it expects to reset. Flat tensors that have state are left alone.
    """
    counts_in_python = type(inner).__name__ == "DeepSpeedCPUAdam"
    for flat in layout.flats():
        if inner.state.get(flat.tensor):
            continue
        step = torch.zeros((), dtype=torch.float32, device=flat.tensor.device)
        inner.state[flat.tensor] = {
            "step": 0 if counts_in_python else step,
            "exp_avg": torch.zeros_like(flat.tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat.tensor, requires_grad=False),
        }


def get_step(inner: torch.optim.Optimizer, flat: Tensor) -> float:
    """Adam's steps of a flat tensor since the last reset."""
    return float(inner.state[flat]["step"])


def set_step(inner: torch.optim.Optimizer, flat: Tensor, value: float) -> None:
    """Overwrite them, whether the optimizer counts in a tensor or in an integer."""
    state = inner.state[flat]
    if isinstance(state["step"], Tensor):
        state["step"].fill_(value)
    else:
        state["step"] = int(value)
