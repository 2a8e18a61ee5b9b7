"""Flat pieces of trained parameters and their gradients, whatever the host did to the storage.

A piece is a contiguous range of the flattened parameter. One rank of a shard group holds it, or
some of them, or every rank holds everything.
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
from spectral_scale.parallel.dtensor_layout import Layout, Layouts
from spectral_scale.parallel.shard_geometry import FlatOrder, Range, Shape


@dataclass(frozen=True, kw_only=True)
class ShardGroup:
    """The ranks over which one copy of the model is spread."""

    index: int = 0
    """This rank's place in it."""
    size: int = 1
    """Ranks in it; 1: this rank holds everything."""
    handle: dist.ProcessGroup | None = None
    """What collectives go through; None if `size` is 1."""
    writes: bool = True
    """Whether this copy of the model is the one that checkpoints take."""
    copy: int = 0
    """Which copy of the model it is."""
    replica_ranks: tuple[int, ...] = (0,)
    """Global ranks that hold the same pieces, by copy."""
    replica_handle: dist.ProcessGroup | None = None
    """What collectives of those go through; None if there is one copy."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place. Collective over it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def take_from(self, tensor: Tensor, copy: int) -> None:
        """Overwrite it in place with another copy's. Collective over those that hold it."""
        if len(self.replica_ranks) > 1:
            dist.broadcast(tensor, self.replica_ranks[copy], group=self.replica_handle)


class ParameterShards(Protocol):
    """This rank's pieces. Nothing here communicates."""

    group: ShardGroup
    """Who holds the pieces."""
    shapes: Mapping[str, Shape]
    """Logical shape of each trained parameter, by fqn, in the same order on every rank."""
    device: torch.device
    """Where collectives of the group take tensors from."""

    def order(self, fqn: str) -> FlatOrder:
        """In which order its elements are flattened."""

    def held(self, fqn: str) -> list[Range]:
        """The range that each rank of the group holds. Ranges of two ranks are the same or have
        no element in common."""

    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's range, a 1-D view; None if there is no gradient."""

    def value(self, fqn: str) -> Tensor:
        """The full-precision value of this rank's range, a 1-D view."""


class SteppedShards(ParameterShards, Protocol):
    """Pieces for an optimizer that steps parts of what its host gave it by itself."""

    def members(self, parameter: Tensor) -> list[str]:
        """Trained parameters that lie in what the host's optimizer calls one, on any rank."""

    def part(self, fqn: str, tensor: Tensor) -> Tensor:
        """This rank's range in that, or in its gradient while it is stepped, a 1-D view."""


@runtime_checkable
class ShardsMaker(Protocol):
    """A `ParameterStore` that knows its host's pieces."""

    def pieces(self) -> ParameterShards:
        """Those of the trained parameters. Collective."""


class TensorShards:
    """Pieces of plain tensors, which every rank holds whole, or of DTensors.

    Args:
        parameters: trained ones by fqn, all of them whole or spread over ranks of one mesh, in
            rows, in equal blocks of columns, or in rows of such blocks.
        mesh: all ranks as a mesh, if parameters lie on a part of it only (tensor parallelism).

    Raises ConfigError for parameters that are cut in other ways.
    """

    def __init__(self, parameters: Mapping[str, Tensor], mesh: DeviceMesh | None = None) -> None:
        self._parameters = dict(parameters)
        self.shapes: Mapping[str, Shape] = {
            fqn: tuple(p.shape) for fqn, p in self._parameters.items()
        }
        self.device = next(iter(self._parameters.values())).device
        layouts = Layouts(mesh)
        self._layouts = {
            fqn: layouts.of(p) if isinstance(p, DTensor) else None
            for fqn, p in self._parameters.items()
        }
        self._orders = {
            fqn: _order(fqn, self.shapes[fqn], layout) for fqn, layout in self._layouts.items()
        }
        widest = max((x for x in self._layouts.values() if x), key=lambda x: x.parts, default=None)
        self.group = _group(widest)
        self._ranks = widest.shard_ranks if widest else (0,)
        for layout in self._layouts.values():
            if layout is not None and not layout.piece_of.keys() >= set(self._ranks):
                raise ConfigError(
                    "trained parameters are spread over different groups of ranks; one group is "
                    "required: give all calls of fully_shard the same mesh"
                )
        self._held = {fqn: self._ranges(fqn) for fqn in self._parameters}
        self._names = {id(parameter): fqn for fqn, parameter in self._parameters.items()}

    def order(self, fqn: str) -> FlatOrder:
        """Row-major, or by blocks of columns where columns are cut."""
        return self._orders[fqn]

    def held(self, fqn: str) -> list[Range]:
        """Whole rows, of everything or of a block of columns."""
        return self._held[fqn]

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
        """Its own name."""
        return [self._names[id(parameter)]]

    def part(self, fqn: str, tensor: Tensor) -> Tensor:
        """All of it that is here. Raises RuntimeError if it is not contiguous."""
        return local(tensor).view(-1)

    def _ranges(self, fqn: str) -> list[Range]:
        layout, shape, order = self._layouts[fqn], self.shapes[fqn], self._orders[fqn]
        if layout is None:
            return [(0, order.numel)] * self.group.size
        pieces = [layout.piece_of[rank] for rank in self._ranks]
        return [order.range_of(layout.rectangle(shape, piece)) for piece in pieces]


def _order(fqn: str, shape: Shape, layout: Layout | None) -> FlatOrder:
    cuts = layout.cuts if layout else ()
    blocks = prod(cut.parts for cut in cuts if cut.dim == 1)
    if any(cut.dim > 1 for cut in cuts) or (blocks > 1 and len(shape) != 2):
        raise ConfigError(
            f"{fqn} of shape {shape} is cut along dimension {max(cut.dim for cut in cuts)}; only "
            "rows, and columns of matrices, may be cut: leave out shard_placement_fn"
        )
    if blocks > 1 and shape[1] % blocks:
        raise ConfigError(
            f"{fqn} has {shape[1]} columns, which {blocks} ranks do not divide; shard it along its "
            "rows"
        )
    return FlatOrder(shape, blocks)


def _group(widest: Layout | None) -> ShardGroup:
    """That of the parameter that is cut most."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if widest is None or (widest.shard_group is None and widest.replica_group is None):
        return ShardGroup(writes=rank == 0)
    return ShardGroup(
        index=widest.index,
        size=widest.parts,
        handle=widest.shard_group,
        writes=widest.is_first_replica,
        copy=widest.replica_of[rank],
        replica_ranks=widest.replica_ranks,
        replica_handle=widest.replica_group,
    )


def is_first_holder(pieces: ParameterShards, fqn: str) -> bool:
    """Whether this rank is the first of those that hold its range: what is added up over ranks, or
    saved, comes from it alone."""
    held = pieces.held(fqn)
    return held.index(held[pieces.group.index]) == pieces.group.index
