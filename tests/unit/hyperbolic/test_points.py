"""Points of the hyperboloid stay on it, as precisely as is documented."""

import math

import pytest
import torch
from torch import Tensor

from spectral_scale.hyperbolic import centroid, exp_at_origin, lift, minkowski, minkowski_pairs


def off(x: Tensor) -> float:
    """The largest distance of <x, x> from -1."""
    return float((minkowski(x.double(), x.double()) + 1).abs().max())


def near(reach: float) -> Tensor:
    """200 points around one at this distance from the origin, float64."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 15, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, 15, generator=generator, dtype=torch.float64)
    return lift(math.sinh(reach) * centre / centre.norm() + 0.3 * noise)


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(50, 200, generator=generator, dtype=torch.float64).softmax(1)


def test_the_maps_lead_to_the_hyperboloid() -> None:
    v = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = exp_at_origin(v)
    assert max(off(x), off(lift(v)), off(centroid(weights() @ near(1.0)))) < 1e-10
    torch.testing.assert_close(x[:, 0].acosh(), v.norm(dim=1))  # its distance from the origin
    assert off(weights() @ near(1.0)) > 1e-3  # the twin: a mean of points is none


def test_long_vectors_are_cut_and_the_origin_has_a_gradient() -> None:
    assert float(exp_at_origin(torch.tensor([[100.0, 0.0]]))[0, 0]) == pytest.approx(
        math.cosh(10), rel=1e-4
    )
    zero = torch.zeros(1, 3, requires_grad=True)
    exp_at_origin(zero).sum().backward()
    assert zero.grad is not None and bool(torch.isfinite(zero.grad).all())


def test_pairs_are_all_products() -> None:
    x, y = near(1.0)[:3], near(2.0)[:4]
    expected = torch.stack([minkowski(a, y).squeeze(-1) for a in x])
    torch.testing.assert_close(minkowski_pairs(x, y), expected)


@pytest.mark.parametrize(("reach", "bound"), [(1.0, 1e-5), (2.6, 1e-4), (4.6, 5e-3)])
def test_the_centroid_in_float32_is_as_precise_as_documented(reach: float, bound: float) -> None:
    exact = centroid(weights() @ near(reach))
    found = centroid(weights().float() @ near(reach).float())
    assert float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max()) < bound


def test_far_from_the_origin_float32_fails() -> None:
    """The twin: at a time of about 1,500 the subtraction cancels all digits."""
    exact = centroid(weights() @ near(8.0))
    found = centroid(weights().float() @ near(8.0).float())
    assert float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max()) > 0.05


def test_fewer_bits_than_float32_are_widened() -> None:
    x = near(1.0).to(torch.bfloat16)
    found = (minkowski(x, x), minkowski_pairs(x, x), lift(x), exp_at_origin(x), centroid(x))
    assert {tensor.dtype for tensor in found} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert minkowski_pairs(x.float(), x.float()).dtype == torch.float32
