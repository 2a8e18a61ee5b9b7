"""GaLore (arXiv 2403.03507): AdamW whose moments of a matrix live in a subspace of its gradient.

As in the authors' code: the shorter side is projected (the right one of a square matrix) by the
leading singular vectors of the present gradient, renewed every `update_interval` steps; the moments
are kept across renewals; the projected-back update is scaled. Unlike it: AdamW's arithmetic is
torch's (epsilon after the bias correction, decay before the update), the same as every other method
here, and the state is made of tensors only, so that a checkpoint holds all of it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.galore.projection import (
    adamw_step,
    leading_subspace,
    low_rank_state,
    low_rank_updates,
    projects_right,
    subspace_overlap,
)
from spectral_scale.methods.owners import assign_owners
from spectral_scale.ops.precision import exact_products
from spectral_scale.optim.build import adamw_state
from spectral_scale.parallel.collective import Collective, SingleProcess
from spectral_scale.parallel.stacking import alike
from spectral_scale.parallel.table import logical_shape

ADVICE = "restart from the last checkpoint, lower learning rates"
"""Advice in the error after a projection that failed."""


@dataclass(kw_only=True)
class ProjectionStats:
    """Counts of what the latest step touched."""

    projected: int = 0
    """Matrices that this rank updated through a projection."""
    renewed: int = 0
    """Matrices, of any rank, whose projector was renewed in this step."""
    overlaps: list[Tensor] = field(default_factory=list)
    """Overlap of each renewed projector with the one it replaced, 0-dim; none the first time."""


class ProjectedAdamW(torch.optim.Optimizer):
    """torch's AdamW, but for groups that hold `galore_rank`, which subclasses step.

    A projected group also holds `update_interval` (steps between renewals) and `scale`. Its
    parameters are matrices, all of which must have a gradient in every step.

    Args:
        params: groups, as for torch.optim.AdamW.
        lr, betas, eps, weight_decay: defaults of the groups.

    Raises ConfigError for a projected group that is incomplete or holds what is no such matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.stats = ProjectionStats()
        groups = [group for group in self.param_groups if is_projected(group)]
        for group in groups:
            _check_group(group)
        self.matrices = sum(len(group["params"]) for group in groups)
        """Matrices that are projected."""

    @property
    @abstractmethod
    def matrices_here(self) -> int:
        """The number of projected matrices that this rank updates."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter; `stats` then tells what was projected. Collective.

        Raises SpectralError on all ranks alike if a projected matrix has no gradient, or one that
        cannot be decomposed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in (group for group in self.param_groups if group["params"]):
            if is_projected(group):
                _require_gradients(group)
                self._step_projected(group)
            else:
                self._step_plain(group)
        return loss

    @abstractmethod
    def _step_projected(self, group: dict[str, Any]) -> None:
        """Update the matrices of a group, all of which have a gradient."""

    def _step_plain(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        states = [self.state[p] for p in parameters]
        if parameters:
            adamw_step(parameters, gradients, states, group, group["weight_decay"], fused=True)


class GaLoreAdamW(ProjectedAdamW):
    """GaLore where every rank holds whole parameters and their gradients.

    State, created here: tensors `exp_avg`, `exp_avg_sq` and `step`; for projected matrices
    `projector` (short side, r).

    Args:
        params: groups, see `ProjectedAdamW`.
        collective: all ranks that hold the same gradients; each matrix is decomposed on one of
            them and broadcast, so that the work is split and no two ranks can differ.
        adamw: `lr`, `betas`, `eps`, `weight_decay` of the groups that hold none.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        collective: Collective | None = None,
        **adamw: Any,
    ) -> None:
        super().__init__(params, **adamw)
        self.collective = collective or SingleProcess()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _initial_state(parameter, group)

    @property
    def matrices_here(self) -> int:
        """All projected matrices: every rank updates its replica."""
        return self.matrices

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step as `ProjectedAdamW.step` does, and count in `stats` what this step alone touched."""
        self.stats = ProjectionStats()
        return super().step(closure)

    def _step_projected(self, group: dict[str, Any]) -> None:
        taken = int(self.state[group["params"][0]]["step"])
        if taken % group["update_interval"] == 0:
            self._renew(group, first=taken == 0)
        for places in alike([self.state[p]["exp_avg"] for p in group["params"]]):
            self._update([group["params"][i] for i in places], group)
            self.stats.projected += len(places)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices whose moments have one shape."""
        states = [self.state[parameter] for parameter in parameters]
        updates = low_rank_updates([gradient_of(p) for p in parameters], states, group)
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        with exact_products():
            for parameter, state, update in zip(parameters, states, updates, strict=True):
                if projects_right(parameter.shape):
                    parameter.addmm_(update, state["projector"].t(), alpha=group["scale"])
                else:
                    parameter.addmm_(state["projector"], update, alpha=group["scale"])

    def _renew(self, group: dict[str, Any], *, first: bool) -> None:
        """Each rank decomposes the gradients that it owns; then every projector is broadcast."""
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
            raise SpectralError(f"{agreed}; {ADVICE}")
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
    """True for a parameter group whose matrices are updated through projections."""
    return "galore_rank" in group


def _check_group(group: dict[str, Any]) -> None:
    for key in ("update_interval", "scale"):
        if key not in group:
            raise ConfigError(f"a group with galore_rank needs {key!r}; it has {sorted(group)}")
    for parameter in group["params"]:
        shape = logical_shape(parameter)
        if len(shape) != 2 or not 1 <= group["galore_rank"] <= min(shape):
            raise ConfigError(
                f"galore_rank={group['galore_rank']} does not fit a parameter of shape {shape}: "
                "projected parameters are matrices with 1 <= rank <= min(m, n)"
            )


def _require_gradients(group: dict[str, Any]) -> None:
    missing = sum(p.grad is None for p in group["params"])
    if missing:
        raise SpectralError(
            f"{missing} of {len(group['params'])} projected matrices have no gradient; "
            "leave matrices that do not train out of the projected group"
        )


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, which `step` has checked to be there."""
    if parameter.grad is None:
        raise RuntimeError("a projected parameter has lost its gradient inside the step")
    return parameter.grad


def _initial_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    if not is_projected(group):
        return adamw_state(parameter)
    step = torch.zeros((), dtype=torch.float32)  # on the CPU: read in every step
    return {"step": step} | low_rank_state(tuple(parameter.shape), group["galore_rank"], parameter)
