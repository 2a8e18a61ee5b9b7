"""Flat shards of trained parameters and their gradients, whatever the backend did to the storage.

A shard is one contiguous range of the flattened parameter (`shard_geometry.FlatOrder` says how it
is flattened). Of a 4 x 3 matrix over two ranks the ranges are, as (first element, elements):

    FSDP2                   [(0, 6), (6, 6)]     whole rows
    ZeRO-1, -2              [(0, 5), (5, 7)]     the partition's boundary may cut a row
    ZeRO, another partition [(0, 0), (0, 12)]    rank 0 holds other parameters
    DDP                     [(0, 12), (0, 12)]   every rank holds everything

Invariant: the ranges of two ranks of the group are the same or have no element in common, and
together they cover the parameter. What must happen once per element (sums over ranks, checkpoint
writes) is done by the first rank that holds it: `is_first_holder`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.collective import Collective, ProcessGroup, SingleProcess
from spectral_scale.parallel.dtensor_collectives import local
from spectral_scale.parallel.dtensor_layout import DTensorLayout, DTensorLayouts
from spectral_scale.parallel.group import present_group
from spectral_scale.parallel.shard_geometry import FlatOrder, Range, Shape


@dataclass(frozen=True, kw_only=True)
class ShardGroup:
    """The ranks that hold the model: those of one replica, and those of one shard."""

    shards: Collective = field(default_factory=SingleProcess)
    """The ranks over which this replica of the model is sharded; one rank holds everything."""
    replicas: Collective = field(default_factory=SingleProcess)
    """The ranks that hold the same shards as this one, by replica."""

    @property
    def index(self) -> int:
        """This rank's index among the shards."""
        return self.shards.rank

    @property
    def size(self) -> int:
        """The number of ranks of one replica."""
        return self.shards.world_size

    @property
    def replica(self) -> int:
        """The index of this replica of the model."""
        return self.replicas.rank

    @property
    def num_replicas(self) -> int:
        """The number of replicas of the model."""
        return self.replicas.world_size

    @property
    def writes(self) -> bool:
        """Whether checkpoints are written from this replica of the model: the first one."""
        return self.replica == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks of this replica, in place. Collective over them."""
        return self.shards.all_reduce_sum(tensor)

    def broadcast_from_replica(self, tensor: Tensor, replica: int) -> None:
        """Overwrite `tensor` in place with that of one replica. Collective over `replicas`."""
        self.replicas.broadcast(tensor, replica)


class ParameterShards(ABC):
    """This rank's shards of the trained parameters, with gradients and optimizer state.

    No method communicates.
    """

    group: ShardGroup
    """The ranks that hold the shards."""
    shapes: Mapping[str, Shape]
    """Logical shape of each trained parameter, by fqn, in the same order on every rank."""
    device: torch.device
    """The device of tensors that the group's collectives take."""
    steps_everywhere: bool = True
    """Whether every rank has the step counts of all parameters, whatever shards it has."""

    @abstractmethod
    def order(self, fqn: str) -> FlatOrder:
        """The order in which the parameter's elements are flattened."""

    @abstractmethod
    def ranges(self, fqn: str) -> list[Range]:
        """The range that each rank of the group holds, by index in the group. The ranges of two
        ranks are the same or have no element in common."""

    @abstractmethod
    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's range, a 1-D view; None if there is no gradient."""

    @abstractmethod
    def value(self, fqn: str) -> Tensor:
        """The full-precision value of this rank's range, a 1-D view."""

    @abstractmethod
    def moments(self, fqn: str) -> Mapping[str, Tensor]:
        """Optimizer state of this rank's range by key, as 1-D views; none without an optimizer."""

    def whole_state(self, fqn: str) -> Mapping[str, Tensor]:
        """Optimizer state of other shapes than the parameter's by key, whole on every rank."""
        return {}

    @abstractmethod
    def step_counts(self) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """Each step count of the optimizer that this rank keeps, and the parameters it is of."""

    def members(self, parameter: Tensor) -> list[str]:
        """Trained parameters inside one parameter of the backend's optimizer, on any rank.

        Raises ConfigError where no optimizer of the method's own can step the shards.
        """
        raise ConfigError(self._unreached())

    def local_view(self, fqn: str, tensor: Tensor) -> Tensor:
        """This rank's range of `fqn` inside such a parameter, or inside its gradient while it is
        stepped, as a 1-D view. Raises ConfigError as `members` does."""
        raise ConfigError(self._unreached())

    def _unreached(self) -> str:
        return (
            f"an optimizer of the method's own does not reach the parameters behind "
            f"{type(self).__name__}; set parallel.backend to torch, fsdp2 or deepspeed"
        )


class TensorShards(ParameterShards):
    """Shards of plain tensors, which every rank holds whole, or of DTensors.

    Args:
        parameters: trained parameters by fqn, all of them whole or sharded over the ranks of one
            mesh: by rows, by equal blocks of columns, or by rows of such blocks.
        mesh: all ranks as a mesh, if parameters lie on a sub-mesh only (tensor parallelism).
        optimizer: a torch optimizer of the parameters, whose state is reached; None: no state is.

    Raises ConfigError for parameters that are sharded in other ways.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        mesh: DeviceMesh | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer = optimizer
        self.shapes: Mapping[str, Shape] = {
            fqn: tuple(p.shape) for fqn, p in self._parameters.items()
        }
        self.device = next(iter(self._parameters.values())).device
        layouts = DTensorLayouts(mesh)
        self._layouts = {
            fqn: layouts.of(p) if isinstance(p, DTensor) else None
            for fqn, p in self._parameters.items()
        }
        self._orders = {
            fqn: _order(fqn, self.shapes[fqn], layout) for fqn, layout in self._layouts.items()
        }
        widest = max(
            (x for x in self._layouts.values() if x), key=lambda x: x.num_shards, default=None
        )
        self.group = _group(widest, self.device)
        self._ranks = widest.shard_ranks if widest else (0,)
        for layout in self._layouts.values():
            if layout is not None and not layout.shard_of.keys() >= set(self._ranks):
                raise ConfigError(
                    "trained parameters are spread over different groups of ranks; one group is "
                    "required: give all calls of fully_shard the same mesh"
                )
        self._ranges = {fqn: self._ranges_of(fqn) for fqn in self._parameters}
        self._names = {id(parameter): fqn for fqn, parameter in self._parameters.items()}

    def order(self, fqn: str) -> FlatOrder:
        """The order of a parameter's elements: by blocks of columns where columns are sharded."""
        return self._orders[fqn]

    def ranges(self, fqn: str) -> list[Range]:
        """For each rank, its range: whole rows of the parameter or of a block of its columns."""
        return self._ranges[fqn]

    def gradient(self, fqn: str) -> Tensor | None:
        """A view of `.grad`, which is made contiguous if it is not."""
        parameter = self._parameters[fqn]
        if parameter.grad is None:
            return None
        if not local(parameter.grad).is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        return local(parameter.grad).view(-1)

    def value(self, fqn: str) -> Tensor:
        """A view of the parameter, or a copy of one that is not contiguous."""
        return local(self._parameters[fqn]).reshape(-1)

    def moments(self, fqn: str) -> Mapping[str, Tensor]:
        """State of the parameter's shape, as views of its local shards."""
        return {
            key: local(value).view(-1)
            for key, value in self._state(fqn).items()
            if value.shape == self.shapes[fqn]
        }

    def whole_state(self, fqn: str) -> Mapping[str, Tensor]:
        """State of other shapes, such as a projector and moments of what it projects."""
        state = self._state(fqn)
        return {key: value for key, value in state.items() if value.shape != self.shapes[fqn]}

    def step_counts(self) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """Adam's step count of each parameter that has state, with its name."""
        for fqn, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {}) if self._optimizer else {}
            if "step" in state:
                yield state["step"], [fqn]

    def members(self, parameter: Tensor) -> list[str]:
        """The name of the parameter itself."""
        return [self._names[id(parameter)]]

    def local_view(self, fqn: str, tensor: Tensor) -> Tensor:
        """All of the tensor's local shard. Raises RuntimeError if it is not contiguous."""
        return local(tensor).view(-1)

    def _state(self, fqn: str) -> dict[str, Tensor]:
        """All but the step count."""
        if self._optimizer is None:
            return {}
        state = self._optimizer.state.get(self._parameters[fqn], {})
        return {key: state[key] for key in sorted(state) if key != "step"}

    def _ranges_of(self, fqn: str) -> list[Range]:
        layout, shape, order = self._layouts[fqn], self.shapes[fqn], self._orders[fqn]
        if layout is None:
            return [(0, order.numel)] * self.group.size
        shards = [layout.shard_of[rank] for rank in self._ranks]
        return [order.range_of(layout.rectangle(shape, index)) for index in shards]


def _order(fqn: str, shape: Shape, layout: DTensorLayout | None) -> FlatOrder:
    sharded_dims = layout.sharded_dims if layout else ()
    blocks = prod(sharded.num_shards for sharded in sharded_dims if sharded.dim == 1)
    highest = max((sharded.dim for sharded in sharded_dims), default=0)
    if highest > 1 or (blocks > 1 and len(shape) != 2):
        raise ConfigError(
            f"{fqn} of shape {shape} is sharded along dimension {highest}; only rows, and columns "
            "of matrices, may be sharded: leave out shard_placement_fn"
        )
    if blocks > 1 and shape[1] % blocks:
        raise ConfigError(
            f"{fqn} has {shape[1]} columns, which {blocks} ranks do not divide; shard it along its "
            "rows"
        )
    return FlatOrder(shape, blocks)


def _group(widest: DTensorLayout | None, device: torch.device) -> ShardGroup:
    """The shard group of the parameter that is sharded over most ranks."""
    if widest is None or (widest.shard_group is None and widest.replica_group is None):
        return ShardGroup(replicas=present_group())
    found = ShardGroup(
        shards=_collective(widest.shard_group, device),
        replicas=_collective(widest.replica_group, device),
    )
    if (found.index, found.replica) != (widest.shard_index, widest.replica_of[widest.rank]):
        raise ConfigError(
            f"the device mesh does not list its ranks in ascending order (rank {widest.rank}); "
            "make it with init_device_mesh"
        )
    return found


def _collective(group: dist.ProcessGroup | None, device: torch.device) -> Collective:
    return SingleProcess() if group is None else ProcessGroup(device, group)


def is_replicated(shards: ParameterShards, fqn: str) -> bool:
    """Whether another rank holds this rank's range of a parameter; alike on all ranks."""
    ranges = [range_ for range_ in shards.ranges(fqn) if range_[1]]
    return shards.group.num_replicas > 1 or len(set(ranges)) < len(ranges)


def first_holder(shards: ParameterShards, fqn: str) -> int:
    """The index of the first rank that holds this rank's range."""
    ranges = shards.ranges(fqn)
    return ranges.index(ranges[shards.group.index])


def is_first_holder(shards: ParameterShards, fqn: str) -> bool:
    """Whether this rank is the first of those that hold its range; only that one contributes to
    sums over ranks and to checkpoints."""
    return first_holder(shards, fqn) == shards.group.index
