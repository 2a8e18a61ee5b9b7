"""Random vectors see what is wrong with factors, and nothing where nothing is."""

import pytest
import torch

from spectral_scale.ops.factor_checks import (
    directions_problem,
    orthogonality_norm,
    residual_norm,
    residual_problem,
)

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def factors(m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Factors]:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u, sigma, right_h = torch.linalg.svd(weight, full_matrices=False)
    return weight, (u, sigma, right_h.mT)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (40, 25), (25, 40), (256, 256)])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
def test_good_factors_pass_at_any_scale(shape: tuple[int, int], scale: float) -> None:
    weight, (u, sigma, v) = factors(*shape)
    assert residual_problem(weight * scale, u, sigma * scale, v) is None
    assert directions_problem(u, v) is None


def test_norms_are_about_those_of_the_errors() -> None:
    weight, (u, sigma, v) = factors(80, 50, torch.float64)
    oblique = u.clone()
    oblique[:, 7] += 1e-3 * u[:, 8]
    error = oblique.mT @ oblique - torch.eye(50, dtype=u.dtype)
    assert orthogonality_norm(oblique) == pytest.approx(float(error.norm()), rel=1.0)
    longer = sigma.clone()
    longer[3] *= 1.01
    exact = float(((u * (longer - sigma)) @ v.mT).norm() / longer[0])
    assert residual_norm(weight, u, longer, v) == pytest.approx(exact, rel=1.0)


def test_one_wrong_column_among_many_is_seen() -> None:
    weight, (u, sigma, v) = factors(512, 512)
    u[:, 100] = u[:, 101]
    found = directions_problem(u, v)
    assert found is not None and found.startswith("the left directions are not orthonormal")
    assert residual_problem(weight, u, sigma, v) is not None


def test_nan_and_a_lost_matrix_are_seen() -> None:
    weight, (u, sigma, v) = factors(6, 5)
    assert residual_problem(weight, u, torch.zeros_like(sigma), v) is not None
    u[0, 0] = torch.nan
    assert directions_problem(u, v) is not None and residual_problem(weight, u, sigma, v)
