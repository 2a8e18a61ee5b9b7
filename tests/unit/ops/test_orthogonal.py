"""The Newton-Schulz iteration on Gram matrices: against the plain iteration and an SVD."""

import pytest
import torch
from torch import Tensor

from spectral_scale.ops.orthogonal import COEFFICIENTS, ITERATIONS, polar_multiplier


def plain(x: Tensor) -> Tensor:
    """Muon's iteration as published, on the matrix itself."""
    a, b, c = COEFFICIENTS
    x = x / x.norm()
    for _ in range(ITERATIONS):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def drawn(m: int, r: int, condition: float) -> Tensor:
    """A matrix whose singular values fall geometrically from 3 to 3 / condition."""
    generator = torch.Generator().manual_seed(m + r)
    u, v = (torch.randn(n, r, generator=generator).double() for n in (m, r))
    sigma = 3 * torch.logspace(0, -1, r, base=condition).double()
    return torch.linalg.qr(u)[0] * sigma @ torch.linalg.qr(v)[0].T


@pytest.mark.parametrize(("m", "r"), [(64, 4), (7, 7), (33, 1)])
def test_it_is_the_published_iteration(m: int, r: int) -> None:
    x = drawn(m, r, 100.0)
    found = x @ polar_multiplier(x.T @ x)
    torch.testing.assert_close(found, plain(x), rtol=1e-9, atol=1e-9)
    single = x.float()
    rough = single @ polar_multiplier(single.T @ single)
    assert (rough - plain(x)).abs().max() < 1e-3


def test_it_comes_near_the_polar_factor_of_an_svd() -> None:
    """Singular vectors are kept, and singular values brought to within 0.68 and 1.14."""
    x = drawn(50, 6, 100.0)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = u.T @ (x @ polar_multiplier(x.T @ x)) @ vh.T
    torch.testing.assert_close(found, found.diagonal().diag(), rtol=0, atol=1e-9)
    assert 0.68 < found.diagonal().min() and found.diagonal().max() < 1.14
    # The twin: a wrong coefficient, and the published one without its last iteration, are seen.
    values = torch.linalg.svdvals(x) / x.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS - 1):
        values = a * values + b * values**3 + c * values**5
    assert (found.diagonal() - values).abs().max() > 0.1


def test_many_at_a_time_and_zero() -> None:
    xs = torch.stack([drawn(20, 3, 10.0), torch.zeros(20, 3).double(), 1e-9 * drawn(20, 3, 5.0)])
    found = xs @ polar_multiplier(xs.mT @ xs)
    for one, x in zip(found, xs, strict=True):
        torch.testing.assert_close(one, x @ polar_multiplier(x.T @ x))
    assert not found[1].any() and found.isfinite().all()
    assert found[2].norm() > 1
    assert not torch.zeros(2, 20, 3).matmul(polar_multiplier(torch.zeros(2, 3, 3))).any()
