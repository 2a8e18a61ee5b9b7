"""Flat pieces of trained parameters and their gradients, whatever the host did to the storage.

A piece is a contiguous range of the row-major flattened parameter. One rank of a shard group holds
it, or every rank holds everything.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectral_scale.errors import CheckpointError, ConfigError
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.layouts import Layout, Layouts
from spectral_scale.parallel.ranges import rectangles_of_range
from spectral_scale.parallel.rectangles import Shape
from spectral_scale.parallel.shards import local

Range = tuple[int, int]
"""First element and number of elements, in the flattened tensor."""


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
    copy_ranks: tuple[int, ...] = (0,)
    """Global ranks that hold the same pieces, by copy."""
    copy_handle: dist.ProcessGroup | None = None
    """What collectives of those go through; None if there is one copy."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place. Collective over it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def take_from(self, tensor: Tensor, copy: int) -> None:
        """Overwrite it in place with another copy's. Collective over those that hold it."""
        if len(self.copy_ranks) > 1:
            dist.broadcast(tensor, self.copy_ranks[copy], group=self.copy_handle)


class Pieces(Protocol):
    """This rank's pieces. Nothing here communicates."""

    group: ShardGroup
    """Who holds the pieces."""
    shapes: Mapping[str, Shape]
    """Logical shape of each trained parameter, by fqn, in the same order on every rank."""
    device: torch.device
    """Where collectives of the group take tensors from."""

    def held(self, fqn: str) -> list[Range]:
        """The range that each rank of the group holds."""

    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's range, a 1-D view; None if there is no gradient."""

    def value(self, fqn: str) -> Tensor:
        """The full-precision value of this rank's range, a 1-D view."""

    def members(self, parameter: Tensor) -> list[str]:
        """Trained parameters that lie in what the host's optimizer calls one, on any rank."""

    def part(self, fqn: str, tensor: Tensor) -> Tensor:
        """This rank's range in that, or in its gradient while it is stepped, a 1-D view."""


class TensorPieces:
    """Pieces of plain tensors, which every rank holds whole, or of DTensors cut into rows.

    Args:
        parameters: trained ones by fqn, all of them whole or all under one `fully_shard` mesh.

    Raises ConfigError for parameters that are cut in other ways.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self.shapes: Mapping[str, Shape] = {
            fqn: tuple(p.shape) for fqn, p in self._parameters.items()
        }
        self.device = next(iter(self._parameters.values())).device
        layouts = Layouts()
        self._layouts = {
            fqn: layouts.of(p) if isinstance(p, DTensor) else None
            for fqn, p in self._parameters.items()
        }
        _refuse_other_cuts(self._layouts)
        self.group = _group(layout for layout in self._layouts.values() if layout)
        self._names = {id(parameter): fqn for fqn, parameter in self._parameters.items()}

    def held(self, fqn: str) -> list[Range]:
        """Whole rows; all of them where nothing is cut."""
        layout, shape = self._layouts[fqn], self.shapes[fqn]
        if layout is None or layout.dim is None:
            return [(0, prod(shape))] * self.group.size
        boxes = [layout.rectangle(shape, index) for index in range(self.group.size)]
        return [(box.offset[0] * prod(shape[1:]), box.numel) for box in boxes]

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


def _refuse_other_cuts(layouts: Mapping[str, Layout | None]) -> None:
    groups = {layout.shard_group for layout in layouts.values() if layout and layout.shard_group}
    if len(groups) > 1:
        raise ConfigError(
            "trained parameters are spread over different groups of ranks; one group is required: "
            "give all calls of fully_shard the same mesh"
        )
    for fqn, layout in layouts.items():
        if layout is not None and layout.dim not in (None, 0):
            raise ConfigError(
                f"{fqn} is cut along dimension {layout.dim}; only rows (dimension 0) may be cut: "
                "leave out shard_placement_fn"
            )


def _group(layouts: Iterable[Layout]) -> ShardGroup:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for layout in layouts:
        if layout.shard_group is not None or layout.copy_group is not None:
            return ShardGroup(
                index=layout.index,
                size=layout.parts,
                handle=layout.shard_group,
                writes=layout.is_first_copy,
                copy=layout.copy_of[rank],
                copy_ranks=layout.copy_ranks,
                copy_handle=layout.copy_group,
            )
    return ShardGroup(writes=rank == 0)


def range_chunks(name: str, part: Tensor, start: int, shape: Shape) -> Iterator[TensorChunk]:
    """A 1-D piece that begins at element `start` as rectangles of its logical tensor."""
    done = 0
    for box in rectangles_of_range(start, part.numel(), shape):
        piece = part[done : done + box.numel].view(box.shape)
        yield TensorChunk(name, piece, shape, box.offset)
        done += box.numel


def read_range(read: ReadTensor, name: str, start: int, numel: int, shape: Shape) -> Tensor:
    """The inverse: `numel` saved elements from `start` on, 1-D. Raises CheckpointError."""
    pieces = [read(name, b.offset, b.shape) for b in rectangles_of_range(start, numel, shape)]
    if sum(piece.numel() for piece in pieces) != numel:
        raise CheckpointError(f"{name} does not hold elements {start} to {start + numel}")
    return torch.cat([piece.reshape(-1) for piece in pieces]) if pieces else torch.empty(0)
