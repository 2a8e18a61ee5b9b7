"""Flat ranges as rectangles and as columns, against the plainest computation."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_scale.parallel.shard_geometry import (
    Rectangle,
    column_square_sums,
    columns_divided,
    rectangles_of_range,
    tiling_fault,
)

SHAPES = [(), (1,), (5,), (1, 4), (3, 4), (4, 1), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_range_is_its_boxes_in_flat_order(shape: tuple[int, ...]) -> None:
    size = prod(shape)
    tensor = torch.arange(size).view(shape)
    whole = Rectangle((0,) * len(shape), shape)
    for start in range(size):
        for numel in range(size - start + 1):
            boxes = list(rectangles_of_range(start, numel, shape))
            elements = [e for b in boxes for e in tensor[b.slices_in(whole)].flatten().tolist()]
            assert elements == list(range(start, start + numel))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), max_size=3))
def test_shards_of_a_matrix_tile_it(cuts: list[int]) -> None:
    edges = sorted({0, 12, *cuts})
    pairs = zip(edges, edges[1:], strict=False)
    boxes = [b for a, z in pairs for b in rectangles_of_range(a, z - a, (3, 4))]
    assert tiling_fault(boxes, (3, 4)) is None


def test_a_lost_shard_is_not_a_tiling() -> None:
    assert tiling_fault(list(rectangles_of_range(0, 11, (3, 4))), (3, 4)) is not None


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 19), st.integers(0, 20))
def test_columns_of_a_range(columns: int, start: int, numel: int) -> None:
    """Sums and divisions by column agree with those of the matrix, other elements left alone."""
    flat = torch.arange(1.0, 1 + 8 * columns)
    start, part = min(start, flat.numel()), flat[start : start + numel].clone()
    inside = torch.zeros_like(flat)
    inside[start : start + numel] = part
    expected = inside.view(-1, columns).square().sum(0)
    torch.testing.assert_close(column_square_sums(part, start, columns), expected)
    divisors = torch.arange(2.0, 2 + columns)
    found = columns_divided(torch.stack([part, -part]), start, torch.stack([divisors, divisors]))
    quotient = (flat.view(-1, columns) / divisors).view(-1)[start : start + part.numel()]
    torch.testing.assert_close(found, torch.stack([quotient, -quotient]))
