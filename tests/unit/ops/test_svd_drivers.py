"""Which driver decomposes a matrix on which device, and the one by the Gram matrix."""

import pytest
import torch

from spectral_scale.ops import svd_drivers
from spectral_scale.ops.decomposition import compose, svd
from spectral_scale.ops.factor_checks import orthogonality_norm
from spectral_scale.ops.null_space import fix_null_space
from spectral_scale.ops.svd_drivers import drivers, gram_svd

DEFAULT, GESVD, GRAM, CPU = (
    "the default driver",
    "gesvd",
    "float64 Gram matrix",
    "float64 on the CPU",
)


def names(*shape: int, on_cuda: bool, dtype: torch.dtype = torch.float32) -> list[str]:
    weight = torch.empty(shape, device="meta", dtype=dtype)
    return [name for name, _ in drivers(weight, on_cuda=on_cuda)]


def test_order_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """gesvdj comes first for small matrices only; CPUs keep LAPACK's order for all of them."""
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert names(4096, 4096, on_cuda=False) == [DEFAULT, CPU]
    assert names(2048, 512, on_cuda=True) == [DEFAULT, GESVD, CPU]
    assert names(2048, 513, on_cuda=True) == [GRAM, GESVD, DEFAULT, CPU]
    assert names(2048, 513, on_cuda=True, dtype=torch.float64) == [GESVD, DEFAULT, CPU]
    capability = (8, 9)  # L40S: float64 at 1/64 of the rate
    assert names(2048, 513, on_cuda=True) == [GESVD, DEFAULT, CPU]


def test_gesvd_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def watch(matrix: torch.Tensor, **kwargs: object) -> object:
        asked.append(kwargs.get("driver"))
        return torch.eye(3), torch.ones(3), torch.eye(3)

    monkeypatch.setattr(torch.linalg, "svd", watch)
    monkeypatch.setattr(svd_drivers, "has_fast_float64", lambda device: False)
    weight = torch.zeros(600, 600)
    for _, driver in drivers(weight, on_cuda=True):
        driver(weight)
    assert asked == ["gesvd", None, None]


def spectrum(kind: str, n: int) -> torch.Tensor:
    if kind == "flat":
        return torch.ones(n)
    if kind == "rank deficient":
        return torch.cat([torch.linspace(3, 1, n // 4), torch.zeros(n - n // 4)])
    return torch.logspace(0, -12, n)


@pytest.mark.parametrize("kind", ["flat", "rank deficient", "steep"])
def test_gram_matrix_gives_factors_as_good_as_lapacks(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n = 300, 120

    def orthonormal(rows: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))[0]

    sigma = spectrum(kind, n)
    weight = ((orthonormal(m) * sigma) @ orthonormal(n).t()).float()
    left, found, right_h = gram_svd(weight)
    u, found, v = fix_null_space(left, found, right_h.mT)
    assert all(t.dtype == torch.float32 for t in (u, found, v))
    assert float((found - sigma).abs().max()) < 1e-4 if kind == "steep" else 1e-5
    assert max(orthogonality_norm(u), orthogonality_norm(v)) < 1e-4
    reference = svd(weight)
    error = float((compose(u, found, v) - weight).norm())
    assert error <= 2 * float((compose(*reference) - weight).norm()) + 1e-6


def test_gram_matrix_of_zeros() -> None:
    left, sigma, right_h = gram_svd(torch.zeros(8, 3))
    assert not bool(sigma.any()) and not bool(left.any())
    torch.testing.assert_close(right_h @ right_h.mT, torch.eye(3))
