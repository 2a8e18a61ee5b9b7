"""GaLore (arXiv 2403.03507): AdamW whose moments of a matrix live in a subspace of its gradient.

As in the authors' code: the shorter side is projected (the right one of a square matrix) by the
leading singular vectors of the present gradient, renewed every `update_interval` steps; the moments
are kept across renewals; the projected-back update is scaled. Unlike it: AdamW's arithmetic is
torch's (epsilon after the bias correction, decay before the update), the same as every other method
here, and the state is made of tensors only, so that a checkpoint holds all of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.ops.decomposition import svd
from spectral_scale.parallel.collective import Collective, SingleProcess
from spectral_scale.spectral.owners import assign_owners


@dataclass(kw_only=True)
class ProjectionStats:
    """What the latest step touched."""

    projected: int = 0
    """Matrices updated through a projection."""
    renewed: int = 0
    """Of those, the ones whose projector was renewed in this step."""
    overlaps: list[Tensor] = field(default_factory=list)
    """Overlap of each renewed projector with the one it replaced, 0-dim; none the first time."""


class GaLoreAdamW(torch.optim.Optimizer):
    """GaLore for groups that hold `galore_rank`, torch's AdamW for the others.

    A projected group also holds `update_interval` (steps between renewals) and `scale`. Its
    parameters are matrices, all of which must have a gradient in every step. State, created here:
    tensors `exp_avg`, `exp_avg_sq` and `step`; for projected matrices `projector` (short side, r).

    Args:
        params: groups, as for torch.optim.AdamW.
        lr, betas, eps, weight_decay: defaults of the groups.
        collective: all ranks that hold the same gradients; each matrix is decomposed on one of
            them and broadcast, so that the work is shared and no two ranks can differ.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        collective: Collective | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.collective = collective or SingleProcess()
        self.stats = ProjectionStats()
        for group in self.param_groups:
            if is_projected(group):
                _check_group(group)
            for parameter in group["params"]:
                self.state[parameter] = _initial_state(parameter, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter; `stats` then tells what was projected.

        Collective in steps that renew projectors. Raises SpectralError on all ranks alike if a
        projected matrix has no gradient, or one that cannot be decomposed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.stats = ProjectionStats()
        for group in self.param_groups:
            if is_projected(group):
                self._step_projected(group)
            else:
                self._step_plain(group)
        return loss

    def _step_plain(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        states = [self.state[p] for p in parameters]
        if parameters:
            _adamw(parameters, gradients, states, group, group["weight_decay"], fused=True)

    def _step_projected(self, group: dict[str, Any]) -> None:
        missing = sum(p.grad is None for p in group["params"])
        if missing:
            raise SpectralError(
                f"{missing} of {len(group['params'])} projected matrices have no gradient; "
                "leave matrices that do not train out of the projected group"
            )
        taken = int(self.state[group["params"][0]]["step"])
        if taken % group["update_interval"] == 0:
            self._renew(group, first=taken == 0)
        for parameter in group["params"]:
            self._update(parameter, group)
            self.stats.projected += 1

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """AdamW on the projected gradient from a zero start gives the update to project back."""
        state = self.state[parameter]
        projector, right = state["projector"], projects_right(parameter.shape)
        gradient = parameter.grad
        low = gradient @ projector if right else projector.t() @ gradient
        update = torch.zeros_like(low)
        _adamw([update], [low], [state], group, weight_decay=0.0, fused=False)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        if right:
            parameter.addmm_(update, projector.t(), alpha=group["scale"])
        else:
            parameter.addmm_(projector, update, alpha=group["scale"])

    def _renew(self, group: dict[str, Any], *, first: bool) -> None:
        """Each rank decomposes its share of the gradients; then all receive every projector."""
        parameters = group["params"]
        shapes = {str(i): tuple(p.shape) for i, p in enumerate(parameters)}
        owners = list(assign_owners(shapes, self.collective.world_size).values())
        renewed: dict[int, Tensor] = {}
        problem = None
        try:
            for i, parameter in enumerate(parameters):
                if owners[i] == self.collective.rank:
                    renewed[i] = leading_subspace(parameter.grad, group["galore_rank"])
        except (ValueError, torch.linalg.LinAlgError) as error:
            problem = f"gradient of shape {tuple(parameter.shape)}: {error}"
        agreed = self.collective.agree(problem, what="GaLore projection")
        if agreed is not None:
            raise SpectralError(f"{agreed}; restart from the last checkpoint, lower learning rates")
        for i, parameter in enumerate(parameters):
            projector = self.state[parameter]["projector"]
            fresh = renewed.pop(i, None)
            fresh = torch.empty_like(projector) if fresh is None else fresh
            self.collective.broadcast(fresh, owners[i])
            if not first:
                self.stats.overlaps.append(subspace_overlap(projector, fresh))
            projector.copy_(fresh)
            self.stats.renewed += 1


def is_projected(group: dict[str, Any]) -> bool:
    """Whether a parameter group's matrices are updated through projections."""
    return "galore_rank" in group


def projects_right(shape: torch.Size) -> bool:
    """Whether the input side of a matrix (out, in) is projected: it is not the longer one."""
    return shape[0] >= shape[1]


def leading_subspace(gradient: Tensor, rank: int) -> Tensor:
    """Orthonormal (shorter side, rank): the leading singular vectors on the projected side.

    Raises ValueError for a gradient that is not finite, LinAlgError if no SVD driver succeeds.
    """
    u, _, v = svd(gradient)
    factor = v if projects_right(gradient.shape) else u
    return factor[:, :rank].contiguous()


def subspace_overlap(old: Tensor, new: Tensor) -> Tensor:
    """Mean squared cosine of the angles between two subspaces: 1 equal, 0 orthogonal; 0-dim."""
    return (old.t() @ new).square().sum() / old.shape[1]


def _check_group(group: dict[str, Any]) -> None:
    for key in ("update_interval", "scale"):
        if key not in group:
            raise ConfigError(f"a group with galore_rank needs {key!r}; it has {sorted(group)}")
    for parameter in group["params"]:
        shape = tuple(parameter.shape)
        if len(shape) != 2 or not 1 <= group["galore_rank"] <= min(shape):
            raise ConfigError(
                f"galore_rank={group['galore_rank']} does not fit a parameter of shape {shape}: "
                "projected parameters are matrices with 1 <= rank <= min(m, n)"
            )


def _initial_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    device = parameter.device
    if not is_projected(group):
        return {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    long, short, r = max(parameter.shape), min(parameter.shape), group["galore_rank"]
    moments = (long, r) if projects_right(parameter.shape) else (r, long)
    return {
        "step": torch.zeros((), dtype=torch.float32),  # on the CPU: read in every step
        "exp_avg": parameter.new_zeros(moments),
        "exp_avg_sq": parameter.new_zeros(moments),
        "projector": parameter.new_zeros(short, r),
    }


def _adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    weight_decay: float,
    *,
    fused: bool,
) -> None:
    """One step of torch's AdamW, in place."""
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )
