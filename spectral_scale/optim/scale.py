"""SCALE (Glentis et al., arXiv 2506.16659): normalised gradients, and one momentum.

A weight (out, in) moves against its gradient, each column of which (one input, all outputs) is
divided by its length. The output layer alone has momentum, which takes the place of its gradient;
with tied embeddings it is the embedding. AdamW trains what is no matrix.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from spectral_scale.config.schema import OptimizerConfig
from spectral_scale.optim.build import adamw_state, build_adamw
from spectral_scale.optim.composite import CompositeOptimizer, Part, divided

NORMALISED, LAST = "normalised", "normalised/last"
"""Names of the groups of matrices, and of the one with momentum; of one kind."""
MOMENTUM = "momentum_buffer"


def build_scale(
    groups: Iterable[dict[str, Any]], config: OptimizerConfig, *, last: str
) -> CompositeOptimizer:
    """SCALE for all dense matrices at `spectral_lr`, fused AdamW for the rest, without state yet.

    Args:
        groups: of `param_groups`.
        config: learning rates; betas[0] is the momentum of the output layer.
        last: fqn of the output layer's weight, or of the embedding that it is tied to.
    """
    groups = list(groups)
    fqns = [fqn for group in groups if group["name"] == "dense" for fqn in group["fqns"]]
    rates = {"lr": config.spectral_lr, "base_lr": config.spectral_lr}
    own = {NORMALISED: rates | {"momentum": 0.0}, LAST: rates | {"momentum": config.betas[0]}}
    taken = {fqn: LAST if fqn == last else NORMALISED for fqn in fqns}
    matrices = Part(make=NormalisedSGD, state=_momentum_state)
    rest = Part(make=lambda of: build_adamw(of, config), state=lambda p, _: adamw_state(p))
    return CompositeOptimizer(divided(groups, own, taken), {NORMALISED: matrices}, rest)


class NormalisedSGD(torch.optim.Optimizer):
    """Steps matrices by columns of length `lr`; groups hold `momentum`, which may be 0."""

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"]:
            state = self.state[parameter]
            if MOMENTUM not in state:
                state |= _momentum_state(parameter, group)
            gradient = state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
        length = torch.linalg.vector_norm(gradient, dim=0, keepdim=True)
        length.clamp_min_(torch.finfo(length.dtype).tiny)  # a column of zeros stays as it is
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(gradient, length.expand_as(gradient), value=-group["lr"])


def _momentum_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Nothing, or zero momentum."""
    if not group["momentum"]:
        return {}
    return {MOMENTUM: torch.zeros_like(parameter, requires_grad=False)}
