"""Chunks: rectangles of logical tensors, which backends hand to checkpoints.

A checkpoint knows logical tensors only, never ranks, so that it can be read on any number of them.
Of a 3 x 4 matrix `model/w` that ZeRO flattened over two ranks, rank 1 holds the elements 6 to 11,
which `range_chunks` writes as two chunks:

    model/w@1,2   offset (1, 2), shape (1, 2)    the rest of row 1
    model/w@2,0   offset (2, 0), shape (1, 4)    row 2

`read_range` is the inverse, for any range: another number of ranks asks for other rectangles, and
the reader takes them from the chunks that overlap.

Invariant: the chunks that all ranks write of one tensor tile it, each element once
(`shard_geometry.tiling_fault`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.shard_geometry import FlatOrder, Rectangle, Shape

ReadTensor = Callable[..., Tensor]
"""(name, offset=None, shape=None) -> that rectangle of a saved logical tensor, or all of it."""


@dataclass(frozen=True)
class TensorChunk:
    """A rectangle of a logical tensor, as the rank that writes it holds it."""

    name: str
    """Logical name, the same on every rank, e.g. `optimizer/<fqn>/exp_avg`."""
    tensor: Tensor
    """The elements of the rectangle, on any device."""
    global_shape: Shape
    """Shape of the whole logical tensor."""
    offset: Shape
    """First index of the rectangle in the logical tensor, in each dimension."""

    @property
    def rectangle(self) -> Rectangle:
        """The rectangle of the logical tensor that the chunk covers."""
        return Rectangle(tuple(self.offset), tuple(self.tensor.shape))

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole tensor."""
        return tuple(self.tensor.shape) == tuple(self.global_shape)

    @property
    def key(self) -> str:
        """Name inside the file: the logical name if whole, else `name@offset` (names have no @)."""
        return self.name if self.is_whole else f"{self.name}@{','.join(map(str, self.offset))}"

    @property
    def num_bytes(self) -> int:
        """Size of the elements."""
        return self.tensor.numel() * self.tensor.element_size()


def whole(name: str, tensor: Tensor) -> TensorChunk:
    """The chunk that is all of a logical tensor."""
    return TensorChunk(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def range_chunks(name: str, shard: Tensor, start: int, order: FlatOrder) -> Iterator[TensorChunk]:
    """A 1-D shard that begins at element `start`, as chunks of its logical tensor."""
    done = 0
    for box in order.rectangles(start, shard.numel()):
        elements = shard[done : done + box.numel].view(box.shape)
        yield TensorChunk(name, elements, order.shape, box.offset)
        done += box.numel


def read_range(read: ReadTensor, name: str, start: int, numel: int, order: FlatOrder) -> Tensor:
    """The `numel` saved elements from `start` on, 1-D, as `range_chunks` wrote them.

    Raises CheckpointError if the tensor does not hold that many.
    """
    found = [read(name, b.offset, b.shape) for b in order.rectangles(start, numel)]
    if sum(chunk.numel() for chunk in found) != numel:
        raise CheckpointError(f"{name} does not hold elements {start} to {start + numel}")
    return torch.cat([chunk.reshape(-1) for chunk in found]) if found else torch.empty(0)


def overwrite(tensors: Iterable[tuple[str, Tensor]], read: ReadTensor) -> None:
    """Give whole tensors their saved values, in place. Raises CheckpointError for other shapes."""
    with torch.no_grad():
        for name, tensor in tensors:
            value = read(name)
            if value.shape != tensor.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(value.shape)} in the checkpoint, "
                    f"the model needs {tuple(tensor.shape)}"
                )
            tensor.copy_(value)
