"""The geometry against a brute-force count of how often each element is covered."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_scale.parallel.shard_geometry import Rectangle, outside, tiling_fault


def rectangles_in(shape: tuple[int, ...]) -> st.SearchStrategy[Rectangle]:
    sides = [
        st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: (min(p), max(p)))
        for n in shape
    ]
    return st.tuples(*sides).map(
        lambda pairs: Rectangle(tuple(a for a, _ in pairs), tuple(b - a for a, b in pairs))
    )


def coverage(rectangles: list[Rectangle], shape: tuple[int, ...]) -> np.ndarray:
    counts = np.zeros(shape, dtype=int)
    for r in rectangles:
        counts[r.slices_in(Rectangle((0,) * len(shape), shape))] += 1
    return counts


@st.composite
def shapes_with_rectangles(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple))
    return shape, draw(st.lists(rectangles_in(shape), max_size=5))


@st.composite
def tilings(draw):
    """A box cut at random places, recursively: always an exact tiling."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    pieces = [Rectangle((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        piece = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        pieces += cut(piece, axis, draw(st.integers(0, piece.shape[axis])))
    return shape, draw(st.permutations(pieces))


def cut(piece: Rectangle, axis: int, at: int) -> list[Rectangle]:
    low, high, start = list(piece.shape), list(piece.shape), list(piece.offset)
    low[axis], high[axis] = at, piece.shape[axis] - at
    start[axis] += at
    return [Rectangle(piece.offset, tuple(low)), Rectangle(tuple(start), tuple(high))]


@given(shapes_with_rectangles())
@settings(max_examples=200, deadline=None)
def test_fault_exactly_where_an_element_is_not_covered_once(case):
    shape, rectangles = case
    assert (tiling_fault(rectangles, shape) is None) == bool(
        (coverage(rectangles, shape) == 1).all()
    )


@st.composite
def cells_of_the_right_number(draw):
    """As many unit cells as the shape has, perhaps some twice: only overlaps can be wrong."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple))
    cells = list(np.ndindex(shape))
    chosen = draw(st.permutations(cells))
    if draw(st.booleans()):
        chosen[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from(cells))
    return shape, [Rectangle(cell, (1,) * len(shape)) for cell in chosen]


@given(cells_of_the_right_number())
@settings(max_examples=200, deadline=None)
def test_right_volume_does_not_hide_an_overlap(case):
    shape, cells = case
    assert (tiling_fault(cells, shape) is None) == (len(set(cells)) == len(cells))


def test_a_long_box_overlaps_one_that_begins_much_later():
    boxes = [Rectangle((i,), (1,)) for i in range(1, 9)]
    boxes[3] = Rectangle((5,), (4,))
    assert "twice" in (tiling_fault([Rectangle((0,), (1,)), *boxes], (12,)) or "")


@given(tilings())
@settings(max_examples=100, deadline=None)
def test_every_exact_tiling_is_accepted_and_each_missing_rectangle_noticed(case):
    shape, pieces = case
    assert tiling_fault(pieces, shape) is None
    for i, piece in enumerate(pieces):
        rest = pieces[:i] + pieces[i + 1 :]
        assert (tiling_fault(rest, shape) is None) == (piece.numel == 0)


@given(shapes_with_rectangles())
@settings(max_examples=100, deadline=None)
def test_intersection_is_what_both_cover(case):
    shape, rectangles = case
    for a in rectangles:
        for b in rectangles:
            common = a.intersect(b)
            both = (coverage([a], shape) * coverage([b], shape)).sum()
            assert both == (common.numel if common else 0)


def test_zero_dimensional_tensors_are_one_element():
    point = Rectangle((), ())
    assert tiling_fault([point], ()) is None
    assert "0 of 1" in (tiling_fault([], ()) or "")
    assert "twice" in (tiling_fault([point, point], ()) or "")


@pytest.mark.parametrize(
    ("offset", "shape", "words"),
    [((0,), (2,), "2 dimensions"), ((0, 3), (2, 3), "exceed"), ((-1, 0), (1, 1), "negative")],
)
def test_outside_says_why(offset, shape, words):
    assert words in (outside(Rectangle(offset, shape), (4, 5)) or "")


def test_many_column_shards_are_compared_by_neighbours_only(monkeypatch):
    compared = []
    real = Rectangle.intersect
    monkeypatch.setattr(Rectangle, "intersect", lambda a, b: compared.append(1) or real(a, b))
    shards = [Rectangle((0, i), (8, 2)) for i in range(0, 2000, 2)]
    assert tiling_fault(shards, (8, 2000)) is None
    assert tiling_fault([*shards[:-1], shards[7]], (8, 2000)) is not None
    assert len(compared) < 10 * len(shards)
