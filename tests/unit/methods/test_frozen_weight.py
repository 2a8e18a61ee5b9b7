"""Products with frozen weights of eight bits, and that no wide copy of a weight outlives one."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_scale.methods import frozen_weight
from spectral_scale.methods.sst import forward, fused_product
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.ops import int8
from spectral_scale.testing.oracle import PlainSpectralProduct

M, N, R, TOKENS = 48, 40, 6, 20


def filled(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[SpectralLinear, Tensor]:
    """A layer with a residual of eight bits, and the residual's values in full precision."""
    generator = torch.Generator().manual_seed(0)
    layer = SpectralLinear(N, M, R, residual_dtype="int8", dtype=dtype, **options)
    weight = torch.randn(M, N, generator=generator, dtype=dtype)
    weight *= torch.logspace(-1, 1, M).unsqueeze(1)
    q, scale = int8.quantise_rows(weight)
    with torch.no_grad():
        for parameter in (layer.u, layer.v, layer.sigma, layer.bias):
            parameter.normal_(generator=generator)
        layer.residual.copy_(q)
        layer.residual_scale.copy_(scale)
    layer.ready = True
    return layer, weight


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, N, generator=generator, dtype=torch.float64).to(dtype)
    g = torch.randn(TOKENS, M, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), g


def outcome(layer: SpectralLinear) -> dict[str, Tensor]:
    """The output and all gradients of one product."""
    x, g = batch(layer.u.dtype)
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | trained


def oracle(layer: SpectralLinear) -> dict[str, Tensor]:
    """The same with the dequantised residual, in floating point."""
    x, g = batch(layer.u.dtype)
    trained = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()
               if p.requires_grad}  # fmt: skip
    weight = int8.dequantise(layer.residual, layer.residual_scale, x.dtype)
    y = PlainSpectralProduct.apply(
        x, weight, trained["u"], trained["v"], None, None, trained["sigma"], trained["bias"],
        True, False,
    )  # fmt: skip
    y.backward(g)
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in trained.items()}


def multiply(monkeypatch: pytest.MonkeyPatch, as_it_is: bool) -> None:
    """Take the products of a processor that multiplies eight bits, or of one that does not."""
    monkeypatch.setattr(frozen_weight, "multiplies_int8", lambda _: as_it_is)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_only_inputs_are_rounded_where_it_is_multiplied(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the dequantised oracle: x and dL/dy are rounded to 1 in 127 of their row's largest
    entry, and the factors' gradients, which take them as they are, are exact."""
    layer, _ = filled(dtype)
    multiply(monkeypatch, True)
    found, expected = outcome(layer), oracle(layer)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    limits = {"y": 0.01, "x": 0.02}
    for name, value in expected.items():
        assert off(found[name], value) < limits.get(name, exact), name
    assert off(found["y"], expected["y"]) > 1e-4  # they are rounded


def test_elsewhere_the_weight_is_widened_for_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both products, as another device takes them, equal the dequantised oracle."""
    layer, _ = filled(torch.float64)
    expected = oracle(layer)
    multiply(monkeypatch, False)
    for fused in (set(), {"cpu"}):
        monkeypatch.setattr(forward, "FUSED_ON", fused)
        for name, value in outcome(layer).items():
            assert off(value, expected[name]) < 1e-12, (name, fused)


def test_only_a_processor_with_the_instructions_multiplies_eight_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for able in (True, False):
        monkeypatch.setattr(int8, "processor_multiplies", lambda able=able: able)
        assert frozen_weight.multiplies_int8(torch.device("cpu")) is able
        assert not frozen_weight.multiplies_int8(torch.device("cuda"))


def test_effective_weight_is_what_is_multiplied() -> None:
    layer, weight = filled()
    residual = layer.effective_weight() - (layer.u * layer.sigma) @ layer.v.t()
    assert 1e-3 < off(residual.detach(), weight) < 0.01


class WideWeights(TorchDispatchMode):
    """Remembers every floating tensor of m n elements or more that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim == 2:
                if tensor.shape[0] in (M, N) and tensor.shape[1] >= min(M, N):
                    self.made.append(weakref.ref(tensor.untyped_storage()))
        return out

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.made)


def wide_weights(layer: SpectralLinear) -> tuple[int, int, int]:
    """Wide weights made in a pass, and those alive between the passes and after them."""
    x, g = batch()
    with WideWeights() as seen:
        y = layer(x)
        between = seen.alive()
        y.backward(g)
        after = seen.alive()
    return len(seen.made), between, after


def test_no_wide_weight_outlives_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is made at all where it is multiplied; elsewhere one a product, gone before the next."""
    layer, _ = filled()
    multiply(monkeypatch, True)
    assert wide_weights(layer) == (0, 0, 0)
    multiply(monkeypatch, False)
    made, between, after = wide_weights(layer)
    assert made >= 2 and between == after == 0


def test_a_kept_copy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a form that keeps what it widened."""
    layer, _ = filled()
    multiply(monkeypatch, False)
    monkeypatch.setattr(forward, "FUSED_ON", {"cpu"})
    kept: list[Tensor] = []

    def keeping(*args: Any) -> Tensor:
        kept.append(frozen_weight.widened(*args))
        return kept[-1]

    monkeypatch.setattr(fused_product, "widened", keeping)
    assert wide_weights(layer)[1] > 0
