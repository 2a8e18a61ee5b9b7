"""Ranges of a tensor that lies in blocks of columns are boxes of it, and every order is undone."""

import pytest
import torch

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import FlatOrder, Rectangle, tiling_fault

SHAPE = (4, 6)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_places_and_boxes_say_the_same(blocks: int) -> None:
    """The boxes of every range hold, in turn, the elements that lie there."""
    order = FlatOrder(SHAPE, blocks)
    matrix = torch.arange(order.numel).view(SHAPE)
    flat = order.from_row_major(matrix.flatten())
    torch.testing.assert_close(order.to_row_major(flat), matrix.flatten())
    entries = torch.arange(order.numel)
    torch.testing.assert_close(flat[order.places(entries)], entries)
    for start in range(order.numel):
        for numel in range(order.numel - start + 1):
            boxes = list(order.rectangles(start, numel))
            here = [matrix[b.slices_in(Rectangle((0, 0), SHAPE))].flatten() for b in boxes]
            found = torch.cat(here) if here else torch.empty(0, dtype=torch.int64)
            torch.testing.assert_close(found, flat[start : start + numel])
    assert tiling_fault(list(order.rectangles(0, order.numel)), SHAPE) is None


def test_whole_rows_of_a_block_are_a_range() -> None:
    order = FlatOrder(SHAPE, 2)
    assert order.range_of(Rectangle((1, 3), (2, 3))) == (12 + 3, 6)
    assert order.range_of(Rectangle((4, 0), (0, 3))) == (12, 0)
    assert FlatOrder((4, 2, 3)).range_of(Rectangle((1, 0, 0), (2, 2, 3))) == (6, 12)
    assert FlatOrder((5,)).range_of(Rectangle((2,), (3,))) == (2, 3)
    assert FlatOrder(()).range_of(Rectangle((), ())) == (0, 1)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("box", [Rectangle((0, 1), (4, 2)), Rectangle((0, 0), (2, 2))])
def test_other_boxes_are_refused(blocks: int, box: Rectangle) -> None:
    with pytest.raises(ConfigError, match="no range of whole rows"):
        FlatOrder(SHAPE, blocks).range_of(box)
