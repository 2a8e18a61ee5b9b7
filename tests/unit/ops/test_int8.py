"""Weights of eight bits: what is rounded, what is exact, and what a fault looks like."""

import pytest
import torch
from torch import Tensor

from spectral_scale.ops import int8

SHAPES = [(9, 7), (64, 33), (130, 48), (1, 1), (0, 5)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=["compiled", "plain"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled loops where they can be had, and in torch alone."""
    if request.param == "plain":
        monkeypatch.setattr(int8, "kernels_for", lambda _: None)
    return request.param


def uneven(m: int, n: int) -> Tensor:
    """Rows whose norms differ by a factor of 1000."""
    return random(m, n) * torch.logspace(-1.5, 1.5, m).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_is_rounded_to_its_own_grid(
    shape: tuple[int, int], dtype: torch.dtype, form: str
) -> None:
    values = random(*shape, dtype=dtype)
    q, scale = int8.quantise_rows(values)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    off = (int8.dequantise(q, scale, torch.float64) - values.double()).abs()
    assert bool((off <= 0.5001 * scale.double().unsqueeze(1)).all())
    if q.numel():
        assert q.abs().amax(1).eq(127).all()


def test_one_row_by_hand() -> None:
    """The example of the module; halves go to the even neighbour."""
    q, scale = int8.quantise_rows(torch.tensor([[0.5, -1.0], [0.2, 0.1]]))
    assert q.tolist() == [[64, -127], [127, 64]]
    assert scale.tolist() == pytest.approx([1 / 127, 0.2 / 127])


def test_rows_of_zeros_stay_zeros(form: str) -> None:
    q, scale = int8.quantise_rows(torch.zeros(3, 4))
    assert not q.any() and bool(torch.isfinite(scale).all())
    assert not int8.dequantise(q, scale, torch.float32).any()
    assert int8.quantisation_error(torch.zeros(3, 4), q, scale) == 0.0


def test_error_of_a_weight() -> None:
    """Relative Frobenius error; 0.0083 for normal rows of 2048, larger with fewer columns only as
    the largest entry is smaller."""
    weight = uneven(128, 512)
    q, scale = int8.quantise_rows(weight)
    found = int8.quantisation_error(weight, q, scale)
    plain = (int8.dequantise(q, scale, torch.float32) - weight).norm() / weight.norm()
    assert found == pytest.approx(float(plain), rel=1e-4)
    assert 0.005 < found < 0.009


def test_the_scale_of_columns_would_be_worse() -> None:
    """The twin: a scale of the wrong axis does not fit rows of different norm."""
    weight = uneven(64, 64)
    q, scale = int8.quantise_rows(weight.t())
    wrong = int8.dequantise(q, scale, torch.float32).t()
    assert float(((wrong - weight).norm(dim=1) / weight.norm(dim=1)).max()) > 0.2
    q, scale = int8.quantise_rows(weight)
    right = int8.dequantise(q, scale, torch.float32)
    assert float(((right - weight).norm(dim=1) / weight.norm(dim=1)).max()) < 0.02


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 3e-3)]
)
@pytest.mark.parametrize("tokens", [0, 1, 65, 300])
def test_products_are_those_of_the_grids(
    dtype: torch.dtype, off: float, tokens: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions equal the plain product of the dequantised operands, through a scratch of
    few rows as well as of many."""
    m, n = 40, 24
    q, scale = int8.quantise_rows(uneven(m, n))
    weight = int8.dequantise(q, scale, torch.float64)
    bias, x, g = random(m, seed=3), random(tokens, n, dtype=dtype), random(tokens, m, dtype=dtype)
    seen = int8.dequantise(*int8.quantise_rows(x), torch.float64)
    folded = int8.dequantise(*int8.quantise_rows(g, scale), torch.float64)
    for scratch in (1, int8.SCRATCH_BYTES):
        monkeypatch.setattr(int8, "SCRATCH_BYTES", scratch)
        y, d_x = int8.linear(x, q, scale, bias), int8.input_gradient(g, q, scale)
        assert y.dtype == d_x.dtype == dtype and y.shape == (tokens, m) and d_x.shape == x.shape
        pairs = [(y, seen @ weight.t() + bias), (d_x, folded @ q.double())]
        for found, expected in pairs:
            assert float((found - expected).norm()) <= off * float(expected.norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float, form: str) -> None:
    """Whole numbers hold no NaN: without care a burst input would become a quiet zero."""
    q, scale = int8.quantise_rows(random(6, 5))
    x, g = random(3, 5), random(3, 6)
    x[1, 2] = g[1, 2] = bad
    for out in (int8.linear(x, q, scale, None), int8.input_gradient(g, q, scale)):
        assert not bool(torch.isfinite(out[1]).any())
        assert bool(torch.isfinite(out[[0, 2]]).all())
