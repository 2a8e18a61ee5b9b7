"""How the spectral controller reaches a logical parameter, whatever its host did to the storage.

`ParameterStore` is the interface; `TorchStore` serves plain torch, where every rank holds every
parameter whole (one process, DistributedDataParallel).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.packing import broadcast_into

MOMENTS = ("exp_avg", "exp_avg_sq")


class ParameterStore(Protocol):
    """Logical parameters by fqn. All methods are collective: every rank calls them alike."""

    collective: Collective
    """The ranks that hold the parameters."""

    def gather(self, fqn: str, *, owner: int) -> Tensor | None:
        """The whole full-precision value on rank `owner`; None elsewhere."""

    def scatter(self, values: Mapping[str, Tensor | None], *, owner: int) -> None:
        """Overwrite parameters, low-precision copies and masters, with rank `owner`'s values."""

    def reset_moments(self, fqns: Sequence[str]) -> int:
        """Zero Adam's moments and step counts in place; the number of logical moments zeroed."""

    def retract_columns(self, fqns: Iterable[str]) -> None:
        """Scale every column to unit length, copies and masters alike."""

    def clamp_nonnegative(self, fqns: Iterable[str]) -> None:
        """Raise negative entries to zero, copies and masters alike."""


@runtime_checkable
class MomentMover(Protocol):
    """A store that can also let moments follow their triplets to other columns. Collective."""

    def move_moments(self, fqn: str, source: Tensor) -> int:
        """Give column j (entry j of a vector) the moments of column `source[j]`, none where -1.

        The step count stays unless nothing is kept, so that a kept moment is not corrected as if
        it were new. `source` (int64) is the same on every rank. Returns the moments zeroed.
        """


class TorchStore:
    """Parameters that every rank holds whole, and a torch optimizer's state of them."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, collective: Collective
    ) -> None:
        self._parameters = dict(model.named_parameters())
        for fqn, parameter in self._parameters.items():
            if isinstance(parameter, DTensor):
                raise ConfigError(
                    f"{fqn} is sharded by fully_shard, and this store needs whole parameters; give "
                    "the controller store=FSDP2Store(model, optimizer)"
                )
        self._optimizer = optimizer
        self.collective = collective

    def gather(self, fqn: str, *, owner: int) -> Tensor | None:
        """This rank's value, on the owner."""
        return self._parameters[fqn].detach() if self.collective.rank == owner else None

    @torch.no_grad()
    def scatter(self, values: Mapping[str, Tensor | None], *, owner: int) -> None:
        """Copy on the owner, then one broadcast of all parameters of a dtype."""
        targets = {fqn: self._parameters[fqn].detach() for fqn in values}
        broadcast_into(targets, values, self.collective, owner=owner)

    @torch.no_grad()
    def reset_moments(self, fqns: Sequence[str]) -> int:
        """Zero exp_avg, exp_avg_sq and step of each parameter that has them."""
        parameters = (self._parameters[fqn] for fqn in fqns)
        return zero_moments(self._optimizer, parameters) if self._optimizer else 0

    @torch.no_grad()
    def move_moments(self, fqn: str, source: Tensor) -> int:
        """Rearrange exp_avg and exp_avg_sq of a parameter that has them, along the last axis."""
        if self._optimizer is None:
            return 0
        return rearrange_moments(self._optimizer, self._parameters[fqn], source, rearrange)

    @torch.no_grad()
    def retract_columns(self, fqns: Iterable[str]) -> None:
        """Scale every column to unit length (methods, "SST": after every step)."""
        for fqn in fqns:
            factor = self._parameters[fqn]
            norms = torch.linalg.vector_norm(factor, dim=0)
            factor.div_(norms.clamp_min_(torch.finfo(factor.dtype).tiny))

    @torch.no_grad()
    def clamp_nonnegative(self, fqns: Iterable[str]) -> None:
        """sigma = max(sigma, 0)."""
        for fqn in fqns:
            self._parameters[fqn].clamp_min_(0)


def zero_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    held: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> int:
    """Zero exp_avg, exp_avg_sq and step of each parameter, in place; the logical entries zeroed.

    `held` gives the part of a moment that this rank holds.
    """
    zeroed = 0
    for parameter in parameters:
        state = optimizer.state[parameter]
        for name in MOMENTS:
            if name in state:
                held(state[name]).zero_()
                zeroed += state[name].numel()
        if "step" in state:
            state["step"].zero_()
    return zeroed


def rearrange_moments(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    source: Tensor,
    move: Callable[[Tensor, Tensor, Tensor], None],
    held: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> int:
    """Let a parameter's moments follow `source`, in place; the logical entries zeroed.

    Args:
        optimizer: has the moments, or has not taken a step.
        parameter: its key.
        source: column j takes the moments of column `source[j]`, or zeros where that is -1; if all
            are, the step count goes to zero, too.
        move: (moment, source clamped to 0, where it was -1) -> None, in place.
        held: the part of a moment that this rank holds.
    """
    new = source < 0
    if bool(new.all()):
        return zero_moments(optimizer, [parameter], held)
    state = optimizer.state[parameter]
    zeroed = 0
    for name in (name for name in MOMENTS if name in state):
        move(state[name], source.clamp_min(0), new)
        zeroed += int(new.sum()) * (state[name].numel() // source.numel())
    return zeroed


def rearrange(moment: Tensor, source: Tensor, new: Tensor) -> None:
    """Column j becomes column `source[j]`, or zero where `new`, in place."""
    moment.copy_(moment.index_select(-1, source).masked_fill_(new, 0.0))
