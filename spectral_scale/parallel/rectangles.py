"""Which part of a logical tensor a chunk holds: integer geometry, no tensors and no files."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rectangle:
    """The half-open box [offset, offset + shape) of a tensor; in 0 dimensions, one point."""

    offset: Shape
    """First index in each dimension."""
    shape: Shape
    """Length in each dimension."""

    @property
    def numel(self) -> int:
        """Elements inside."""
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
    """Sweep along the dimension that is cut most: 1,000 shards need no million comparisons."""
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
