"""Keyed orthonormal columns: orthonormal, a function of their key alone, the same transform."""

import math

import numpy as np
import pytest
import torch

from spectral_scale.ops.keyed_basis import keyed_columns

SIZES = [1, 2, 3, 5, 8, 12, 64, 96, 255]


@pytest.mark.parametrize("size", SIZES)
def test_columns_are_orthonormal(size: int) -> None:
    q = keyed_columns(size, np.arange(size), 0, "a", dtype=torch.float64)
    torch.testing.assert_close(q.t() @ q, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [12, 16])
def test_a_column_does_not_depend_on_what_is_asked_with_it(size: int) -> None:
    """To the bit, in both dtypes: single precision is double precision rounded."""
    for dtype in (torch.float32, torch.float64):
        whole = keyed_columns(size, np.arange(size), 7, "layer", 3, dtype=dtype)
        some = keyed_columns(size, np.array([5, 1, 11]), 7, "layer", 3, dtype=dtype)
        assert torch.equal(some, whole[:, [5, 1, 11]])
    assert torch.equal(keyed_columns(size, np.arange(size), 7, "layer", 3), whole.float())


@pytest.mark.parametrize("size", [12, 16])
@pytest.mark.parametrize("other", [(8, "layer", 3), (7, "other", 3), (7, "layer", 4)])
def test_every_part_of_the_key_counts(size: int, other: tuple[object, ...]) -> None:
    one, two = (keyed_columns(size, np.arange(4), *k) for k in ((7, "layer", 3), other))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("size", [12, 16, 100])
def test_columns_are_those_of_the_transform_but_for_signs_and_order(size: int) -> None:
    """Row signs and the order taken off again, they are Hadamard's or the DCT's, by its formula."""
    q = keyed_columns(size, np.arange(size), "a", dtype=torch.float64)
    i = torch.arange(size, dtype=torch.float64)
    plain = math.sqrt(2 / size) * torch.cos(math.pi * (2 * i[:, None] + 1) * i / (2 * size))
    plain[:, 0] = 1 / math.sqrt(size)
    if size == 16:
        bits = [[bin(a & b).count("1") % 2 for b in range(size)] for a in range(size)]
        plain = (1 - 2 * torch.tensor(bits, dtype=torch.float64)) / 4
    constant = q[:, (q.abs() - 1 / math.sqrt(size)).abs().amax(0) < 1e-12]
    matches = [q * constant[:, j : j + 1].sign() for j in range(constant.shape[1])]
    found = [(m.t() @ plain).abs() for m in matches]
    permutations = [torch.equal(f.round(), f.round() @ f.round().t() @ f.round()) for f in found]
    assert any(
        bool(((f - f.round()).abs().max() < 1e-12) and (f.round().sum(0) == 1).all() and p)
        for f, p in zip(found, permutations, strict=True)
    )


def test_hadamard_entries_have_one_size() -> None:
    q = keyed_columns(64, np.arange(9), "a")
    assert set(q.abs().unique().tolist()) == {0.125}


def test_the_table_of_cosines_is_the_cosine() -> None:
    from spectral_scale.ops.keyed_basis import _table

    for size in (3, 12, 43, 768):
        t = np.arange(4 * size)
        expected = math.sqrt(2 / size) * np.cos(np.pi * t / (2 * size))
        np.testing.assert_allclose(_table(size), expected, rtol=0, atol=5e-16)
