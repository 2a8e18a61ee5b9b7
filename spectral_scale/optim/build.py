"""The optimizer of a run, with its whole state created up front."""

from typing import Any

import torch

from spectral_scale.config.schema import OptimizerConfig


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over `groups`; exp_avg, exp_avg_sq and step exist before the first step.

    State in the constructor makes checkpoints symmetric across ranks and lets the first boundary
    reset what it expects to reset.
    """
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer
