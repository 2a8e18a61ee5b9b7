"""What a rank's shard of a tensor covers: integer geometry of rectangles, ranges and flat order.

A shard is described in two ways, and this module converts one into the other:

- as a `Rectangle` of the logical tensor: what checkpoints, DTensors and tensor parallelism speak;
- as a `Range` of the flattened tensor: what a backend that flattens parameters (ZeRO, Megatron's
  distributed optimizer) gives a rank, which may begin and end in the middle of a row.

Elements 2 to 8 of a flattened 3 x 4 matrix, the range (start 2, numel 7), are three rectangles:

    row 0   .  .  2  3      Rectangle((0, 2), (1, 2))   the rest of a row
    row 1   4  5  6  7      Rectangle((1, 0), (1, 4))   whole rows
    row 2   8  .  .  .      Rectangle((2, 0), (1, 1))   the beginning of a row

Invariant: the rectangles of a range, flattened one after the other, are its elements in flat order.
So a saved range can be read back by ranges that begin elsewhere, on any number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_scale.errors import ConfigError

Shape = tuple[int, ...]

Range = tuple[int, int]
"""First element and number of elements, in the flattened tensor."""


@dataclass(frozen=True)
class Rectangle:
    """The half-open box [offset, offset + shape) of a tensor; in 0 dimensions, one point."""

    offset: Shape
    """First index in each dimension."""
    shape: Shape
    """Length in each dimension."""

    @property
    def numel(self) -> int:
        """Number of elements inside the box."""
        return prod(self.shape)

    @property
    def end(self) -> Shape:
        """First index past the box in each dimension."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: "Rectangle") -> "Rectangle | None":
        """The common box of two boxes of equal rank, or None when it has no element."""
        start = tuple(map(max, self.offset, other.offset))
        stop = tuple(map(min, self.end, other.end))
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Rectangle(start, shape) if all(s > 0 for s in shape) else None

    def slices_in(self, frame: "Rectangle") -> tuple[slice, ...]:
        """Index of this box within a tensor that holds `frame`."""
        starts = tuple(a - b for a, b in zip(self.offset, frame.offset, strict=True))
        return tuple(slice(a, a + s) for a, s in zip(starts, self.shape, strict=True))


def rectangles_of_range(start: int, numel: int, shape: Shape) -> Iterator[Rectangle]:
    """The elements [start, start + numel) of a flattened tensor as boxes, in flat order.

    A matrix gives at most three: the rest of a row, whole rows, the beginning of a row; a tensor of
    d dimensions at most 2 d - 1. An empty range gives none.
    """
    if numel <= 0:
        return
    if len(shape) <= 1:
        yield Rectangle((start,) * len(shape), (numel,) * len(shape))
        return
    stop, inner = start + numel, prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole slices of the first dimension
    if first > last:  # inside one slice
        yield from _within(start // inner, start % inner, numel, shape)
        return
    if start % inner:
        yield from _within(start // inner, start % inner, first * inner - start, shape)
    if last > first:
        rest = (0,) * (len(shape) - 1)
        yield Rectangle((first, *rest), (last - first, *shape[1:]))
    if stop % inner:
        yield from _within(last, 0, stop % inner, shape)


def _within(index: int, start: int, numel: int, shape: Shape) -> Iterator[Rectangle]:
    for box in rectangles_of_range(start, numel, shape[1:]):
        yield Rectangle((index, *box.offset), (1, *box.shape))


@dataclass(frozen=True)
class FlatOrder:
    """The order of a tensor's elements in its flattened form.

    It is row-major, except for a matrix whose columns are sharded (a row-parallel linear under
    tensor parallelism): there, one block of columns follows the other, each row-major. A 3 x 4
    matrix, whose row-major numbers are

        0  1 | 2  3
        4  5 | 6  7          in 2 blocks of columns:  0 1 4 5 8 9 | 2 3 6 7 10 11
        8  9 | 10 11

    In row-major order the left half would be three ranges; in this order it is one, (0, 6), and
    whole rows of a block are one range, as whole rows of a matrix are. The range (2, 7) holds the
    elements 4 5 8 9 2 3 6: rectangles (1, 0) of shape 2 x 2, (0, 2) of 1 x 2 and (1, 2) of 1 x 1.
    """

    shape: Shape
    """Shape of the tensor."""
    column_blocks: int = 1
    """Equal blocks of columns; 1 is row-major. Only a matrix that they divide has more than 1."""

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    def range_of(self, box: Rectangle) -> Range:
        """The range that a rectangle of whole rows is, of the tensor or of one block of columns.

        Raises ConfigError for a box that is anything else.
        """
        block = 0 if self.column_blocks == 1 else box.offset[1] // self._width
        expected = (0, self.shape[1:]) if self.column_blocks == 1 else self._columns(block)
        found = (box.offset[1] if len(box.offset) > 1 else 0, box.shape[1:])
        if box.numel and (found != expected or any(box.offset[2:])):
            raise ConfigError(
                f"a shard of shape {box.shape} at {box.offset} is no range of whole rows of a "
                f"tensor of shape {self.shape}, or of one of {self.column_blocks} equal blocks of "
                "its columns; shard it along its rows"
            )
        inner = prod(self.shape[1:]) // self.column_blocks
        first = box.offset[0] if box.offset else 0
        return block * self._block + first * inner, box.numel

    def rectangles(self, start: int, numel: int) -> Iterator[Rectangle]:
        """The elements [start, start + numel) as boxes of the tensor, in flat order."""
        if self.column_blocks == 1:
            yield from rectangles_of_range(start, numel, self.shape)
            return
        stop = start + numel
        for block in range(self.column_blocks):
            first = max(start, block * self._block)
            last = min(stop, (block + 1) * self._block)
            inside = first - block * self._block
            for box in rectangles_of_range(inside, last - first, (self.shape[0], self._width)):
                row, column = box.offset
                yield Rectangle((row, block * self._width + column), box.shape)

    def places(self, entries: Tensor) -> Tensor:
        """Positions in this order of elements given by their row-major number (int64)."""
        if self.column_blocks == 1:
            return entries
        row, column = entries // self.shape[1], entries % self.shape[1]
        block = torch.div(column, self._width, rounding_mode="floor")
        return block * self._block + row * self._width + column % self._width

    def to_row_major(self, flat: Tensor) -> Tensor:
        """All elements, 1-D, in row-major order: the same tensor where that is this order."""
        if self.column_blocks == 1:
            return flat
        return flat.view(self.column_blocks, self.shape[0], self._width).transpose(0, 1).flatten()

    def from_row_major(self, flat: Tensor) -> Tensor:
        """All elements, 1-D and given in row-major order, in this order."""
        if self.column_blocks == 1:
            return flat
        return flat.view(self.shape[0], self.column_blocks, self._width).transpose(0, 1).flatten()

    @property
    def _width(self) -> int:
        """Columns of a block."""
        return self.shape[1] // self.column_blocks

    @property
    def _block(self) -> int:
        """Elements of a block."""
        return self.numel // self.column_blocks

    def _columns(self, block: int) -> tuple[int, Shape]:
        return block * self._width, (self._width,)


def outside(rectangle: Rectangle, global_shape: Shape) -> str | None:
    """Why the box does not lie within a tensor of `global_shape`, or None if it does."""
    if len(rectangle.offset) != len(global_shape) or len(rectangle.shape) != len(global_shape):
        return (
            f"offset {list(rectangle.offset)} and shape {list(rectangle.shape)} must have "
            f"{len(global_shape)} dimensions, as the tensor of shape {list(global_shape)} has"
        )
    if any(n < 0 for n in (*rectangle.offset, *rectangle.shape, *global_shape)):
        return (
            f"negative number in offset {list(rectangle.offset)}, shape {list(rectangle.shape)} "
            f"or tensor shape {list(global_shape)}"
        )
    if any(e > n for e, n in zip(rectangle.end, global_shape, strict=True)):
        return (
            f"elements {list(rectangle.offset)} to {list(rectangle.end)} exceed the tensor's "
            f"shape {list(global_shape)}"
        )
    return None


def tiling_fault(rectangles: Sequence[Rectangle], global_shape: Shape) -> str | None:
    """Why boxes do not cover each element of `global_shape` exactly once, or None if they do.

    Boxes that lie inside, do not overlap, and have the right volume together cover everything.
    """
    for rectangle in rectangles:
        if fault := outside(rectangle, global_shape):
            return fault
    if overlap := _first_overlap(rectangles):
        a, b = overlap
        return (
            f"written twice: elements {list(a.offset)} to {list(a.end)} and "
            f"{list(b.offset)} to {list(b.end)} overlap; exactly one rank must write each element"
        )
    covered, needed = sum(r.numel for r in rectangles), prod(global_shape)
    if covered != needed:
        return f"only {covered} of {needed} elements of shape {list(global_shape)} are written"
    return None


def _first_overlap(rectangles: Sequence[Rectangle]) -> tuple[Rectangle, Rectangle] | None:
    """The first two rectangles that overlap, found by a sweep along the most sharded dimension.

    Only rectangles that the sweep line still crosses are compared: 1,000 shards along one
    dimension take about 1,000 comparisons, not a million.
    """
    if len(rectangles) < 2:
        return None
    rank = len(rectangles[0].offset)
    axis = max(range(rank), key=lambda d: len({r.offset[d] for r in rectangles}), default=None)
    if axis is None:
        return rectangles[0], rectangles[1]
    active: list[Rectangle] = []
    for current in sorted(rectangles, key=lambda r: r.offset[axis]):
        active = [r for r in active if r.end[axis] > current.offset[axis]]
        for other in active:
            if current.intersect(other):
                return other, current
        active.append(current)
    return None


def column_square_sums(shards: Tensor, start: int, columns: int) -> Tensor:
    """Sums of squares by column of flat ranges that begin at `start`, shape (..., columns).

    A range is padded with zeros to whole rows: of the elements 2 to 8 of a 3 x 4 matrix, two
    zeros before and three after make 3 rows of 4.

    Args:
        shards: the ranges' elements, shape (..., elements).
        start: where the ranges begin in their flattened matrices.
        columns: columns of the matrices.
    """
    return _whole_rows(shards, start, columns).square().sum(-2)


def columns_divided(shards: Tensor, start: int, divisors: Tensor) -> Tensor:
    """The elements of flat ranges (..., elements), each divided by its column's divisor.

    Args:
        shards: the ranges' elements.
        start: where the ranges begin in their flattened matrices.
        divisors: shape (..., columns).
    """
    rows = _whole_rows(shards, start, divisors.shape[-1]).div_(divisors.unsqueeze(-2))
    return rows.flatten(-2).narrow(-1, start % divisors.shape[-1], shards.shape[-1])


def _whole_rows(shards: Tensor, start: int, columns: int) -> Tensor:
    """A copy of flat ranges (..., elements) as (..., rows, columns), zeros around them."""
    before = start % columns
    after = -(before + shards.shape[-1]) % columns
    return F.pad(shards, (before, after)).unflatten(-1, (-1, columns))
