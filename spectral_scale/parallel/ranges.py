"""Flat ranges of a tensor as rectangles, and a flat range's columns: hosts that flatten need both.

Integer geometry but for the two column functions. Ranges are of the row-major flattened tensor.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_scale.parallel.rectangles import Rectangle, Shape

Range = tuple[int, int]
"""First element and number of elements, in the flattened tensor."""


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


def column_square_sums(part: Tensor, start: int, columns: int) -> Tensor:
    """Sums of squares by column of the flat range that begins at `start`, shape (columns,).

    Args:
        part: the range's elements, 1-D.
        start: where it begins in the flattened matrix.
        columns: of the matrix.
    """
    before = start % columns
    after = -(before + part.numel()) % columns
    return F.pad(part, (before, after)).view(-1, columns).square().sum(0)


def divide_columns(part: Tensor, start: int, divisors: Tensor) -> None:
    """Divide each element of a flat range by its column's divisor, in place."""
    columns = divisors.numel()
    index = torch.arange(start, start + part.numel(), device=part.device) % columns
    part.div_(divisors.to(part.device)[index])
