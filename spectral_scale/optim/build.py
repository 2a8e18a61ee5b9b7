"""The optimizer of a run, and its state, created up front."""

from typing import Any

import torch

from spectral_scale.config.schema import OptimizerConfig


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over `groups`, without state yet."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give an AdamW its exp_avg, exp_avg_sq and step, of each parameter's own kind and placement.

    State before the first step makes checkpoints symmetric across ranks and lets the first
    boundary reset what it expects to reset. An optimizer that has state already is left alone.
    """
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
