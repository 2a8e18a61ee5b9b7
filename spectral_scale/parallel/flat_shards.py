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

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.dtensor_collectives import local
from spectral_scale.parallel.dtensor_layout import DTensorLayout, DTensorLayouts
from spectral_scale.parallel.shard_geometry import FlatOrder, Range, Shape


@dataclass(frozen=True, kw_only=True)
class ShardGroup:
    """The ranks over which one replica of the model is sharded."""

    index: int = 0
    """This rank's index in the group."""
    size: int = 1
    """Ranks in the group; 1 if this rank holds everything."""
    handle: dist.ProcessGroup | None = None
    """The process group for its collectives; None if `size` is 1."""
    writes: bool = True
    """Whether checkpoints are written from this replica of the model."""
    replica: int = 0
    """Index of this replica of the model."""
    replica_ranks: tuple[int, ...] = (0,)
    """Global ranks that hold the same shards as this one, by replica."""
    replica_handle: dist.ProcessGroup | None = None
    """The process group of `replica_ranks`; None if there is one replica."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place. Collective over the group."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def broadcast_from_replica(self, tensor: Tensor, replica: int) -> None:
        """Overwrite `tensor` in place with that of one replica. Collective over `replica_ranks`."""
        if len(self.replica_ranks) > 1:
            dist.broadcast(tensor, self.replica_ranks[replica], group=self.replica_handle)


class ParameterShards(Protocol):
    """This rank's shards of the trained parameters. No method communicates."""

    group: ShardGroup
    """The ranks that hold the shards."""
    shapes: Mapping[str, Shape]
    """Logical shape of each trained parameter, by fqn, in the same order on every rank."""
    device: torch.device
    """The device of tensors that the group's collectives take."""

    def order(self, fqn: str) -> FlatOrder:
        """The order in which the parameter's elements are flattened."""

    def ranges(self, fqn: str) -> list[Range]:
        """The range that each rank of the group holds, by index in the group. The ranges of two
        ranks are the same or have no element in common."""

    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's range, a 1-D view; None if there is no gradient."""

    def value(self, fqn: str) -> Tensor:
        """The full-precision value of this rank's range, a 1-D view."""


class SteppedShards(ParameterShards, Protocol):
    """Shards for an optimizer that steps the shards inside its backend's flat tensors itself."""

    def members(self, parameter: Tensor) -> list[str]:
        """Trained parameters inside one parameter of the backend's optimizer, on any rank."""

    def local_view(self, fqn: str, tensor: Tensor) -> Tensor:
        """This rank's range of `fqn` inside such a parameter, or inside its gradient while it is
        stepped, as a 1-D view."""


@runtime_checkable
class ShardsMaker(Protocol):
    """A `ParameterStore` that knows its backend's flat shards."""

    def shards(self) -> ParameterShards:
        """The shards of the trained parameters. Collective."""


class TensorShards:
    """Shards of plain tensors, which every rank holds whole, or of DTensors.

    Args:
        parameters: trained parameters by fqn, all of them whole or sharded over the ranks of one
            mesh: by rows, by equal blocks of columns, or by rows of such blocks.
        mesh: all ranks as a mesh, if parameters lie on a sub-mesh only (tensor parallelism).

    Raises ConfigError for parameters that are sharded in other ways.
    """

    def __init__(self, parameters: Mapping[str, Tensor], mesh: DeviceMesh | None = None) -> None:
        self._parameters = dict(parameters)
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
        self.group = _group(widest)
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
        """Row-major, or by blocks of columns where columns are sharded."""
        return self._orders[fqn]

    def ranges(self, fqn: str) -> list[Range]:
        """Whole rows, of the parameter or of a block of its columns."""
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

    def members(self, parameter: Tensor) -> list[str]:
        """The name of the parameter itself."""
        return [self._names[id(parameter)]]

    def local_view(self, fqn: str, tensor: Tensor) -> Tensor:
        """All of the tensor's local shard. Raises RuntimeError if it is not contiguous."""
        return local(tensor).view(-1)

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


def _group(widest: DTensorLayout | None) -> ShardGroup:
    """The shard group of the parameter that is sharded over most ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if widest is None or (widest.shard_group is None and widest.replica_group is None):
        return ShardGroup(writes=rank == 0)
    return ShardGroup(
        index=widest.shard_index,
        size=widest.num_shards,
        handle=widest.shard_group,
        writes=widest.is_first_replica,
        replica=widest.replica_of[rank],
        replica_ranks=widest.replica_ranks,
        replica_handle=widest.replica_group,
    )


def is_first_holder(shards: ParameterShards, fqn: str) -> bool:
    """Whether this rank is the first of those that hold its range; only that one contributes to
    sums over ranks and to checkpoints."""
    ranges = shards.ranges(fqn)
    return ranges.index(ranges[shards.group.index]) == shards.group.index
