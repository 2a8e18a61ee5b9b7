"""How a controller reaches a logical parameter, whatever its backend did to the storage.

`ParameterStore` is the interface; `TorchStore` serves plain torch, where every rank holds every
parameter whole (one process, DistributedDataParallel).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.flat_shards import ParameterShards, TensorShards
from spectral_scale.parallel.packing import broadcast_into
from spectral_scale.parallel.shard_geometry import Range
from spectral_scale.parallel.stacking import raise_to_zero, unit_columns

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's."""
ALL_MOMENTS = (*MOMENTS, "momentum_buffer")
"""Adam's two and Muon's one."""
Replicated = tuple[str, Tensor, int]
"""Name, this rank's tensor, and the index of the shard that it is (0 if it is the whole)."""


class ParameterStore(ABC):
    """Logical parameters by fqn. All methods are collective: every rank calls them alike."""

    collective: Collective
    """The ranks that hold the parameters."""
    moves_moments: bool = False
    """Whether `move_moments` is there."""
    keeps_parameters: bool = False
    """Whether this rank's trained parameters lie whole in its memory between passes, so that copies
    of them in another precision may do so too."""
    keeps_whole_numbers: bool = False
    """Whether frozen weights of whole numbers (int8) keep every bit of their values: no host casts
    or flattens them among others."""
    retracts_in_step: bool = False
    """Whether every optimizer step scales the columns of u and v to unit length by itself. If so,
    `require_retracted` takes the place of `retract_columns`."""

    @abstractmethod
    def gather(self, fqn: str, *, owner: int) -> Tensor | None:
        """The whole full-precision value on rank `owner`; None elsewhere."""

    @abstractmethod
    def scatter(self, values: Mapping[str, Tensor | None], *, owner: int) -> None:
        """Overwrite parameters, low-precision weights and masters, with rank `owner`'s values."""

    @abstractmethod
    def reset_moments(self, fqns: Sequence[str]) -> int:
        """Zero the moments (Adam's or Muon's) and step counts in place; the number of logical
        moments zeroed."""

    def move_moments(self, fqn: str, source: Tensor) -> int:
        """Give column j (entry j of a vector) the moments of column `source[j]`, none where -1.

        The step count stays unless nothing is kept, so that a kept moment is not corrected as if
        it were new. `source` (int64) is the same on every rank. Returns the moments zeroed. Raises
        SpectralError from a store that cannot (`moves_moments`).
        """
        raise SpectralError(
            f"{type(self).__name__} cannot move moments to other columns; set "
            "spectral.boundary_moments=reset"
        )

    @abstractmethod
    def retract_columns(self, fqns: Iterable[str], *, unless: Tensor | None = None) -> None:
        """Scale every column to unit length, weights and masters alike.

        If `unless` (0-dim bool, on the parameters' device) is true, no bit changes; nobody waits
        for its value. Raises SpectralError from a store that `retracts_in_step`.
        """

    def require_retracted(self, fqns: Iterable[str]) -> None:
        """Raise SpectralError unless the last optimizer step scaled all columns of `fqns`."""
        raise SpectralError(
            f"no optimizer step retracts behind {type(self).__name__}; call retract_columns()"
        )

    @abstractmethod
    def clamp_nonnegative(self, fqns: Iterable[str]) -> None:
        """Raise negative entries to zero, weights and masters alike."""

    @abstractmethod
    def shards(self) -> ParameterShards:
        """This rank's shards of the trained parameters, with gradients and optimizer state; always
        the same object. Raises ConfigError if they cannot be flattened."""

    def weight_range(self, fqn: str) -> Range:
        """The range of the module's weight that this rank has; by default that of its shard."""
        shards = self.shards()
        return shards.ranges(fqn)[shards.group.index]

    @abstractmethod
    def write(self, fqn: str, part: Tensor) -> None:
        """Overwrite a trained parameter's `weight_range`, weight and master alike, with a 1-D
        tensor in flat order, on any device."""

    @abstractmethod
    def replicated_weights(self) -> Iterator[Replicated]:
        """Weights of the module, trained or frozen, that other ranks hold as well: the same names
        on all ranks, in the same order."""


class TorchStore(ParameterStore):
    """Parameters that every rank holds whole, and a torch optimizer's state of them."""

    moves_moments = True
    keeps_parameters = True
    keeps_whole_numbers = True

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
        self._shards: TensorShards | None = None
        self.collective = collective

    def gather(self, fqn: str, *, owner: int) -> Tensor | None:
        """The parameter on the owner, which holds it whole; None on other ranks."""
        return self._parameters[fqn].detach() if self.collective.rank == owner else None

    @torch.no_grad()
    def scatter(self, values: Mapping[str, Tensor | None], *, owner: int) -> None:
        """Copy on the owner, then one broadcast of all parameters of a dtype."""
        targets = {fqn: self._parameters[fqn].detach() for fqn in values}
        broadcast_into(targets, values, self.collective, owner=owner)

    @torch.no_grad()
    def reset_moments(self, fqns: Sequence[str]) -> int:
        """Zero the moments and step of each parameter that has them."""
        parameters = (self._parameters[fqn] for fqn in fqns)
        return zero_moments(self._optimizer, parameters) if self._optimizer else 0

    @torch.no_grad()
    def move_moments(self, fqn: str, source: Tensor) -> int:
        """Rearrange exp_avg and exp_avg_sq of a parameter that has them, along the last axis."""
        if self._optimizer is None:
            return 0
        return rearrange_moments(self._optimizer, self._parameters[fqn], source, rearrange)

    @torch.no_grad()
    def retract_columns(self, fqns: Iterable[str], *, unless: Tensor | None = None) -> None:
        """Scale every column to unit length, which the method does after every step."""
        unit_columns([self._parameters[fqn] for fqn in fqns], unless=unless)

    @torch.no_grad()
    def clamp_nonnegative(self, fqns: Iterable[str]) -> None:
        """sigma = max(sigma, 0)."""
        raise_to_zero(self._parameters[fqn] for fqn in fqns)

    def shards(self) -> TensorShards:
        """Whole parameters, of which this rank is one replica."""
        if self._shards is None:
            trained = {fqn: p for fqn, p in self._parameters.items() if p.requires_grad}
            self._shards = TensorShards(trained, optimizer=self._optimizer)
        return self._shards

    @torch.no_grad()
    def write(self, fqn: str, part: Tensor) -> None:
        """Overwrite the whole parameter."""
        parameter = self._parameters[fqn]
        parameter.copy_(part.view(parameter.shape))

    def replicated_weights(self) -> Iterator[Replicated]:
        """Every parameter, which every rank holds whole."""
        for fqn, parameter in self._parameters.items():
            yield f"model/{fqn}", parameter.detach(), 0


def zero_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    local: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> int:
    """Zero the moments and step of each parameter, in place; the logical entries zeroed.

    `local` gives the shard of a moment that this rank holds.
    """
    zeroed = 0
    for parameter in parameters:
        state = optimizer.state[parameter]
        for name in ALL_MOMENTS:
            if name in state:
                local(state[name]).zero_()
                zeroed += state[name].numel()
        if "step" in state:
            state["step"].zero_()
    return zeroed


def rearrange_moments(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    source: Tensor,
    move: Callable[[Tensor, Tensor, Tensor], None],
    local: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> int:
    """Let a parameter's moments follow `source`, in place; the logical entries zeroed.

    Args:
        optimizer: has the moments, or has not taken a step.
        parameter: its key.
        source: column j takes the moments of column `source[j]`, or zeros where that is -1; if all
            are, the step count goes to zero as well.
        move: (moment, source clamped to 0, where it was -1) -> None, in place.
        local: the shard of a moment that this rank holds.
    """
    new = source < 0
    if bool(new.all()):
        return zero_moments(optimizer, [parameter], local)
    state = optimizer.state[parameter]
    zeroed = 0
    for name in (name for name in MOMENTS if name in state):
        move(state[name], source.clamp_min(0), new)
        zeroed += int(new.sum()) * (state[name].numel() // source.numel())
    return zeroed


def rearrange(moment: Tensor, source: Tensor, new: Tensor) -> None:
    """Column j becomes column `source[j]`, or zero where `new`, in place."""
    moment.copy_(moment.index_select(-1, source).masked_fill_(new, 0.0))
