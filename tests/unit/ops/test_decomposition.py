"""SVD with a fixed gauge, its fall-backs, and measures of spectra."""

import logging
import math

import pytest
import torch

from spectral_scale.ops import decomposition, svd_drivers
from spectral_scale.ops.decomposition import compose, effective_rank, fix_gauge, orthogonality_error
from spectral_scale.ops.decomposition import svd as thin_svd


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_reconstructs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u, sigma, v = thin_svd(weight)
    k = min(shape)
    assert u.shape == (shape[0], k) and v.shape == (shape[1], k) and sigma.shape == (k,)
    torch.testing.assert_close(compose(u, sigma, v), weight)
    assert bool((sigma.diff() <= 0).all()) and bool((sigma >= 0).all())
    assert max(orthogonality_error(u), orthogonality_error(v)) < 1e-5
    assert u.is_contiguous() and v.is_contiguous()


def test_gauge_is_fixed() -> None:
    """Two decompositions that differ in signs become one."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    u, sigma, v = thin_svd(weight)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    u2, _, v2 = fix_gauge(u * signs, sigma, v * signs)
    assert torch.equal(u, u2) and torch.equal(v, v2)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_refused(bad: float) -> None:
    weight = torch.zeros(3, 3)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        thin_svd(weight)


def test_falls_back_to_float64(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = torch.linalg.svd

    def fails_in_single(matrix: torch.Tensor, **kwargs: object) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_single)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    with caplog.at_level(logging.WARNING):
        u, sigma, v = thin_svd(weight)
    assert u.dtype == torch.float32
    torch.testing.assert_close(compose(u, sigma, v), weight)
    assert "float64 on the CPU" in caplog.text
    with pytest.raises(torch.linalg.LinAlgError, match="no SVD driver succeeded"):
        monkeypatch.setattr(
            torch.linalg, "svd", lambda *_, **__: (_ for _ in ()).throw(torch.linalg.LinAlgError())
        )
        thin_svd(weight)


CUSOLVER = "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnSgesvdj`"
"""What torch raises, as a plain RuntimeError, where cuSOLVER returns an error of status."""


def fake_drivers(monkeypatch: pytest.MonkeyPatch, *functions: svd_drivers.Driver) -> None:
    """Have svd() try these instead of the real drivers."""
    listed = [(f"driver {i}", function) for i, function in enumerate(functions)]
    monkeypatch.setattr(decomposition, "drivers", lambda weight, *, on_cuda: listed)


def raises(error: Exception) -> svd_drivers.Driver:
    def driver(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise error

    return driver


def real_driver(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.linalg.svd(weight, full_matrices=False))


def test_errors_of_cusolver_lead_to_the_next_driver(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_drivers(monkeypatch, raises(RuntimeError(CUSOLVER)), real_driver)
    weight = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    with caplog.at_level(logging.WARNING):
        u, sigma, v = thin_svd(weight)
    torch.testing.assert_close(compose(u, sigma, v), weight)
    assert f"driver 1 after driver 0: {CUSOLVER}" in caplog.text
    fake_drivers(monkeypatch, raises(RuntimeError(CUSOLVER)))
    with pytest.raises(torch.linalg.LinAlgError, match="CUSOLVER_STATUS_EXECUTION_FAILED"):
        thin_svd(weight)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_no_driver_can_mend_is_raised(
    monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError]
) -> None:
    """A lack of memory or a broken GPU must not pass for a matrix that cannot be decomposed."""
    fake_drivers(monkeypatch, raises(error("CUDA error")), real_driver)
    with pytest.raises(error, match="CUDA error"):
        thin_svd(torch.eye(3))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("damage", ["left", "right", "sigma", "nan"])
def test_wrong_factors_lead_to_the_next_driver(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shape: tuple[int, int],
    damage: str,
) -> None:
    """Finite factors that are not an SVD would enter the bank and stay there."""

    def damaged(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, sigma, right_h = real_driver(matrix)
        if damage == "left":  # the product stays right, the columns are oblique
            left[:, 3] += 0.01 * left[:, 2]
            sigma[2] = 1e-3
        elif damage == "right":
            right_h[4] *= 1.001
        elif damage == "sigma":
            sigma[0] *= 1.001
        else:
            left[0, 0] = math.nan
        return left, sigma, right_h

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    expected = thin_svd(weight)
    fake_drivers(monkeypatch, damaged, real_driver)
    with caplog.at_level(logging.WARNING):
        found = thin_svd(weight)
    assert "driver 1 after driver 0: the" in caplog.text
    assert all(map(torch.equal, found, expected))


def test_no_driver_meets_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 and autocast of a script around the call are off inside, and on again after it."""
    seen: list[tuple[str, bool]] = []
    matmul = torch.backends.cuda.matmul

    def watching(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.append((matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return real_driver(matrix)

    fake_drivers(monkeypatch, watching)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            u, sigma, v = thin_svd(torch.eye(4))
            assert compose(u, sigma, v).dtype == torch.float32
            assert (u @ v).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "high" and matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("ieee", False)]


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    p = torch.tensor([0.75, 0.25])
    assert effective_rank(8 * p) == pytest.approx(math.exp(-(p * p.log()).sum()))


def test_orthogonality_error() -> None:
    assert orthogonality_error(torch.eye(4)[:, :2]) == 0
    assert orthogonality_error(torch.ones(2, 1)) == pytest.approx(1.0)


def test_wide_matrices_are_decomposed_as_their_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK is several times slower on wide ones; the factors are those of W all the same."""
    real, seen = torch.linalg.svd, []

    def watch(matrix: torch.Tensor, **kwargs: object) -> object:
        seen.append(tuple(matrix.shape))
        return real(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watch)
    tall = torch.randn(9, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u, sigma, v = thin_svd(tall)
    v2, sigma2, u2 = thin_svd(tall.t())
    assert seen == [(9, 4), (9, 4)]
    assert torch.equal(sigma, sigma2)
    signs = (u * u2).sum(0).sign()
    torch.testing.assert_close(u, u2 * signs)
    torch.testing.assert_close(v, v2 * signs)


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_compose_scales_either_factor(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in shape)
    sigma = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(compose(u, sigma, v), u @ torch.diag(sigma) @ v.t())
