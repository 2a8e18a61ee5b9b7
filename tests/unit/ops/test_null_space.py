"""Directions of vanishing singular values: orthonormal, and the same whatever rounding did."""

import pytest
import torch
from torch import Tensor

from spectral_scale.ops import decomposition
from spectral_scale.ops.decomposition import compose, orthogonality_error, svd
from spectral_scale.ops.null_space import fix_null_space

VANISHING = 3


def clamped(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of a random matrix, three of its singular values zero."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, sigma, v = svd(weight)
    sigma[[1, 4, 6]] = 0
    return u, sigma, v


def twice(shape: tuple[int, int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """SVDs of two matrices that differ by rounding."""
    weight = compose(*clamped(shape))
    return [svd(weight), svd(weight * (1 + 2e-16 * torch.rand_like(weight)))]


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_rounding_does_not_choose(shape: tuple[int, int]) -> None:
    for one, other in zip(*twice(shape), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_rounding_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the driver's own basis."""
    monkeypatch.setattr(decomposition, "fix_null_space", lambda *factors: factors)
    (u, _, _), (other, _, _) = twice((8, 8))
    torch.testing.assert_close(u[:, :-VANISHING], other[:, :-VANISHING], atol=1e-10, rtol=0)
    assert float((u - other).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_it_stays_a_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = compose(*clamped(shape)).to(dtype)
    u, sigma, v = svd(weight)
    assert sigma[-VANISHING:].tolist() == [0.0] * VANISHING
    torch.testing.assert_close(compose(u, sigma, v), weight)
    assert max(orthogonality_error(u), orthogonality_error(v)) < 1e-5
    assert u.is_contiguous() and v.is_contiguous() and u.dtype == dtype


def test_a_zero_matrix_has_directions() -> None:
    u, sigma, v = svd(torch.zeros(5, 3))
    assert not sigma.any()
    assert max(orthogonality_error(u), orthogonality_error(v)) < 1e-6


def test_a_regular_matrix_is_left_alone() -> None:
    factors = svd(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)))
    assert all(a is b for a, b in zip(fix_null_space(*factors), factors, strict=True))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_one_zero_of_a_tall_matrix(shape: tuple[int, int]) -> None:
    """The longer side leaves its direction open, too."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u, sigma, v = svd(weight)
    sigma[1] = 0
    weight = compose(u, sigma, v)
    for one, other in zip(svd(weight), svd(weight * (1 + 2e-16)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
