"""In which order the elements of a tensor lie in its flat form, and what a range of it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.ranges import Range, rectangles_of_range
from spectral_scale.parallel.rectangles import Rectangle, Shape


@dataclass(frozen=True)
class FlatOrder:
    """Row-major; or, of a matrix whose columns are cut (row-parallel linears under tensor
    parallelism), one block of columns after the other, each row-major.

    So whole rows of a block of columns are one range, as whole rows of a matrix are.
    """

    shape: Shape
    """Of the tensor."""
    column_blocks: int = 1
    """Equal blocks of columns; 1: row-major. More than 1 only for a matrix that they divide."""

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    def range_of(self, box: Rectangle) -> Range:
        """The range that whole rows are, of the tensor or of one block of columns.

        Raises ConfigError for a box that is anything else.
        """
        block = 0 if self.column_blocks == 1 else box.offset[1] // self._width
        expected = (0, self.shape[1:]) if self.column_blocks == 1 else self._columns(block)
        found = (box.offset[1] if len(box.offset) > 1 else 0, box.shape[1:])
        if box.numel and (found != expected or any(box.offset[2:])):
            raise ConfigError(
                f"a piece of shape {box.shape} at {box.offset} is no range of whole rows of a "
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
        """Where elements, given by their row-major number (int64), lie in this order."""
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
        """The inverse."""
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
