"""A rectangle of a logical tensor, as one rank holds it: what backends hand to checkpoints."""

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
    """Where the rectangle begins in it."""

    @property
    def rectangle(self) -> Rectangle:
        """The part of the logical tensor held here."""
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


def range_chunks(name: str, part: Tensor, start: int, order: FlatOrder) -> Iterator[TensorChunk]:
    """A 1-D piece that begins at element `start` as rectangles of its logical tensor."""
    done = 0
    for box in order.rectangles(start, part.numel()):
        piece = part[done : done + box.numel].view(box.shape)
        yield TensorChunk(name, piece, order.shape, box.offset)
        done += box.numel


def read_range(read: ReadTensor, name: str, start: int, numel: int, order: FlatOrder) -> Tensor:
    """The inverse: `numel` saved elements from `start` on, 1-D. Raises CheckpointError."""
    pieces = [read(name, b.offset, b.shape) for b in order.rectangles(start, numel)]
    if sum(piece.numel() for piece in pieces) != numel:
        raise CheckpointError(f"{name} does not hold elements {start} to {start + numel}")
    return torch.cat([piece.reshape(-1) for piece in pieces]) if pieces else torch.empty(0)


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
