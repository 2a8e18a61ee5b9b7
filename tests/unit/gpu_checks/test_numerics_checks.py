"""The checks of numbers pass here, and find products that are wrong."""

from typing import Any

import pytest
import torch

from spectral_scale.gpu_checks import numerics, svd_times
from spectral_scale.gpu_checks.findings import CheckFinding
from spectral_scale.gpu_checks.place import Place
from spectral_scale.methods.sst import bank
from spectral_scale.methods.sst.layer import SpectralLinear

CPU = torch.device("cpu")


def failed(finding: CheckFinding) -> list[str]:
    return [figure.name for figure in finding.figures if not figure.ok]


def test_layers_pass(place: Place) -> None:
    finding = numerics.check_layers(place)
    assert failed(finding) == [] and len(finding.figures) == 10


@pytest.mark.parametrize("wrong", ["output", "d_input", "d_u", "d_v", "d_sigma", "d_bias"])
def test_a_layer_with_one_wrong_result_fails(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = numerics.run_layer

    def slightly_off(*arguments: Any) -> numerics.Outcome:
        found = right(*arguments)
        found[wrong] = found[wrong] * (1 + 1e-3)
        return found

    monkeypatch.setattr(numerics, "run_layer", slightly_off)
    case = numerics.Case(shape=(12, 8))
    single, _ = numerics.compare_layer(case, CPU, tokens=16, r=2, seed=0)
    assert not single.ok


def test_a_half_precision_layer_worse_than_the_cpu_s_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = numerics.run_layer, []

    def coarse(*arguments: Any) -> numerics.Outcome:
        found = right(*arguments)
        calls.append(arguments[-1])
        if calls.count(torch.bfloat16) == 1 and arguments[-1] == torch.bfloat16:
            found["d_u"] += 0.1 * found["d_u"].abs().max()  # the device's, not the CPU's
        return found

    monkeypatch.setattr(numerics, "run_layer", coarse)
    case = numerics.Case(shape=(12, 8))
    single, half = numerics.compare_layer(case, CPU, tokens=16, r=2, seed=0)
    assert single.ok and not half.ok


def test_the_oracle_leaves_the_singular_value_out_of_directions() -> None:
    layer = numerics.random_layer(
        numerics.Case(shape=(6, 4)), r=2, generator=torch.Generator().manual_seed(0)
    )
    x, g = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    u, v, sigma = (t.detach().clone().requires_grad_() for t in (layer.u, layer.v, layer.sigma))
    assert layer.residual is not None
    y = x @ ((u * sigma) @ v.mT + layer.residual).mT
    y.backward(g)
    found = numerics.oracle(layer, x, g)
    assert u.grad is not None and v.grad is not None and sigma.grad is not None
    torch.testing.assert_close(found["d_u"] * sigma.detach(), u.grad)
    torch.testing.assert_close(found["d_v"] * sigma.detach(), v.grad)
    torch.testing.assert_close(found["d_sigma"], sigma.grad)
    assert isinstance(layer, SpectralLinear)


def as_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values with ten bits after the leading one, as TF32 reads them."""
    bits = tensor.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_the_bank_passes_and_one_that_multiplies_in_tf32_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failed(numerics.check_tf32(place)) == []
    right = bank.compose
    monkeypatch.setattr(bank, "compose", lambda u, s, v: right(as_tf32(u * s), s / s, as_tf32(v)))
    assert len(failed(numerics.check_tf32(place))) == 2


def test_tf32_is_on_inside_and_as_before_outside() -> None:
    before = torch.get_float32_matmul_precision()
    with numerics.tf32_forced_on():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


# -- SVD -------------------------------------------------------------------------------------


def test_svds_pass_and_are_tabled(place: Place) -> None:
    finding = svd_times.check_svd(place)
    assert failed(finding) == []
    assert "| 32 x 128 | LAPACK |" in finding.text and "left out" not in finding.text


def test_an_svd_that_is_not_orthogonal_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def skewed(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, sigma, vh = torch.linalg.svd(a, full_matrices=False)
        return u * 1.001, sigma / 1.001, vh.mT  # the same matrix

    monkeypatch.setattr(svd_times, "svd", skewed)
    wrong = failed(svd_times.check_svd(place))
    assert wrong == [f"{m} x {n}, orthogonality" for m, n in svd_times.SMALL_SHAPES]


def test_an_svd_that_raises_fails_and_a_driver_that_raises_is_recorded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("cusolver error: status 7")

    monkeypatch.setattr(svd_times, "_thin", broken)
    finding = svd_times.check_svd(place)
    assert failed(finding) == [] and "RuntimeError: cusolver error" in finding.text
    monkeypatch.setattr(svd_times, "svd", broken)
    assert len(failed(svd_times.check_svd(place))) == len(svd_times.SMALL_SHAPES)


def test_matrices_for_which_there_is_no_time_are_left_out(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd_times, "SECONDS", 0.0)
    finding = svd_times.check_svd(place)
    assert "left out" in finding.text
