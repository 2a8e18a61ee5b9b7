"""Muon (Jordan et al., 2024; arXiv 2502.16982) beside AdamW, as one optimizer.

The momentum of a matrix, averaged with its gradient once more (Nesterov), is made nearly
orthogonal and scaled by 0.2 sqrt(max(m, n)), so that the root mean square of an update is about
that of Adam's at the same learning rate. Dense matrices are torch's own `torch.optim.Muon`;
factors (m, r) are stepped here, many at a time and however their rows are sharded: ranks exchange
r x r Gram matrices, never a factor, and no matrix (m, n) is formed.
"""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from spectral_scale.config.schema import OptimizerConfig
from spectral_scale.ops.orthogonal import polar_multiplier
from spectral_scale.ops.precision import exact_products
from spectral_scale.optim.build import adamw_state, build_adamw
from spectral_scale.optim.composite import CompositeOptimizer, Part, divided
from spectral_scale.parallel.dtensor_collectives import local, sum_over_shards
from spectral_scale.parallel.dtensor_layout import DTensorLayouts
from spectral_scale.parallel.stacking import alike, stack

MATRICES = "muon"
"""Name of the group of dense matrices that Muon trains, and their kind in metrics and clipping."""
FACTORS = "low_rank"
"""Kind of the groups of factors."""
MOMENTUM = "momentum_buffer"
"""Muon's one moment, as torch.optim.Muon names it."""
RMS = 0.2
"""Root mean square of an update at a learning rate of 1, about that of Adam's."""


def build_muon(
    groups: Iterable[dict[str, Any]], config: OptimizerConfig, *, matrices: Collection[str]
) -> CompositeOptimizer:
    """Muon for `matrices` and for all factors, fused AdamW for the rest, without state yet.

    Args:
        groups: of `param_groups`.
        config: dense matrices train at its `spectral_lr` and decay as other dense matrices do.
        matrices: fqns of dense matrices for Muon; what else is dense stays AdamW's.
    """
    rate, momentum = config.spectral_lr, config.muon_momentum
    taken = dict.fromkeys(matrices, MATRICES)
    own = divided(groups, {MATRICES: {"lr": rate, "base_lr": rate}}, taken)
    parts = {
        FACTORS: Part(make=lambda of: FactorMuon(of, momentum=momentum), state=_momentum_state),
        MATRICES: Part(
            make=lambda of: torch.optim.Muon(of, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            state=_momentum_state,
        ),
    }
    rest = Part(make=lambda of: build_adamw(of, config), state=lambda p, _: adamw_state(p))
    return CompositeOptimizer(own, parts, rest)


class FactorMuon(torch.optim.Optimizer):
    """Muon for factors (m, r) with m >= r, whole or sharded by rows; they do not decay.

    Args:
        params: groups of factors.
        momentum: decay of the moving average of gradients.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(params, {"lr": 1e-3, "momentum": momentum})
        self._layouts = DTensorLayouts(None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One all-reduce of an r x r matrix a factor, where rows are sharded; then local updates.

        Collective: factors have gradients on all ranks or on none.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        factors = [p for p in group["params"] if p.grad is not None]
        momentum = group["momentum"]
        averages = [self._averaged(p, local(p.grad), momentum) for p in factors]
        layouts = [self._layouts.find(factor) for factor in factors]
        kinds = [(f.shape, id(layout)) for f, layout in zip(factors, layouts, strict=True)]
        places = alike(averages, kinds)
        stacks = [stack(averages, members) for members in places]
        with exact_products():
            grams = [whole.mT @ whole for whole in stacks]
            sums = sum_over_shards(grams, [layouts[members[0]] for members in places])
            for members, whole, gram in zip(places, stacks, sums, strict=True):
                scale = group["lr"] * RMS * math.sqrt(max(factors[members[0]].shape))
                updates = (whole @ polar_multiplier(gram)).unbind()
                torch._foreach_add_([local(factors[i]) for i in members], updates, alpha=-scale)

    def _averaged(self, factor: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """Update this rank's shard of the momentum; its average with the gradient's."""
        state = self.state[factor]
        if MOMENTUM not in state:
            state |= _momentum_state(factor, {})
        average = local(state[MOMENTUM])
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def _momentum_state(parameter: Tensor, _: dict[str, Any]) -> dict[str, Tensor]:
    return {MOMENTUM: torch.zeros_like(parameter, requires_grad=False)}
