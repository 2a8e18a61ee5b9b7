"""The product for GPUs against the plain one; on the CPU, where it is not chosen by itself."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_scale.methods.sst import forward as sst_forward
from spectral_scale.methods.sst import fused_product
from spectral_scale.methods.sst.casts import CastCache
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.product import Bottleneck
from spectral_scale.testing.fake_cuda import missing, on_fake_cuda
from spectral_scale.testing.oracle import PlainSpectralProduct


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product; (m, n) is the weight's shape."""

    m: int = 10
    n: int = 7
    r: int = 3
    tokens: int = 9
    bias: bool = True
    enhanced: bool = True
    input_grad: bool = True


CASES = {
    "square": Case(m=24, n=24, r=8, tokens=40),
    "tall": Case(),
    "wide": Case(m=5, n=17, r=2),
    "no bias": Case(bias=False),
    "true partials": Case(enhanced=False),
    "no input gradient": Case(input_grad=False),
    "rank k": Case(r=7),
    "rank 1": Case(r=1),
    "one token": Case(tokens=1),
    "no token": Case(tokens=0),
    "one by one": Case(m=1, n=1, r=1),
}
# Products' dtype, dtype of x, dtype of factors and bias, tolerance.
PRECISIONS = {
    "fp64": (torch.float64, torch.float64, torch.float64, 1e-12),
    "fp64 products of fp32 inputs": (torch.float64, torch.float32, torch.float64, 1e-6),
    "fp32": (torch.float32, torch.float32, torch.float32, 1e-5),
    "bf16 autocast": (torch.bfloat16, torch.float32, torch.float32, 3e-2),
    "bf16 inputs": (torch.bfloat16, torch.bfloat16, torch.float32, 3e-2),
    "bf16 everywhere": (torch.bfloat16, torch.bfloat16, torch.bfloat16, 3e-2),
}


def inputs(case: Case, x_dtype: torch.dtype, trained: torch.dtype) -> dict[str, Any]:
    """x, factors and bias, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": random(case.tokens, case.n).to(x_dtype).requires_grad_(case.input_grad),
        "residual": random(case.m, case.n),
        "u": random(case.m, case.r).to(trained).requires_grad_(),
        "v": random(case.n, case.r).to(trained).requires_grad_(),
        "sigma": random(case.r).abs().to(trained).requires_grad_(),
        "bias": random(case.m).to(trained).requires_grad_() if case.bias else None,
        "g": random(case.tokens, case.m),
    }


def gradients(values: dict[str, Any], y: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    y.backward(values["g"].to(y.dtype))
    leaves = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
    return {"y": y.detach()} | {k: v.grad for k, v in leaves.items()}


def fused(case: Case, precision: str, bottleneck: Bottleneck | None = None) -> dict[str, Tensor]:
    dtype, x_dtype, trained, _ = PRECISIONS[precision]
    v = inputs(case, x_dtype, trained)
    y = fused_product.FusedSpectralProduct.apply(
        v["x"], v["residual"].to(dtype), v["u"], v["v"], v["sigma"], v["bias"], dtype,
        case.enhanced, bottleneck,
    )  # fmt: skip
    return gradients(v, y)


def plain(case: Case, precision: str) -> dict[str, Tensor]:
    dtype, x_dtype, trained, _ = PRECISIONS[precision]
    v = inputs(case, x_dtype, trained)
    y = PlainSpectralProduct.apply(
        v["x"].to(dtype), v["residual"].to(dtype), v["u"], v["v"], None, None, v["sigma"],
        v["bias"], case.enhanced, False,
    )  # fmt: skip
    return gradients(v, y)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error relative to each value's scale."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        if value.numel():
            scale = max(1e-30, float(value.abs().max()))
            worst = max(worst, float((found[name] - value).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_oracle(case: Case, precision: str) -> None:
    found, expected = fused(case, precision), plain(case, precision)
    assert difference(found, expected) <= PRECISIONS[precision][3]


def test_a_forgotten_sigma_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the input's gradient without sigma."""
    expected = plain(Case(), "fp64")
    original = fused_product.cast_factors

    def broken(u: Tensor, v: Tensor, sigma: Tensor, bias: Any, dtype: torch.dtype) -> Any:
        return replace(original(u, v, sigma, bias, dtype), v_sigma_IR=v.detach())

    monkeypatch.setattr(fused_product, "cast_factors", broken)
    assert difference(fused(Case(), "fp64"), expected) > 1e-3


@pytest.mark.parametrize("sharding", ["column_parallel", "row_parallel"])
@pytest.mark.parametrize("cast", [False, True])
def test_two_shards_make_the_whole(sharding: Any, cast: bool) -> None:
    """Two ranks in turn; the sum over them is known from the whole's z and h."""
    case = Case(m=12, n=8, r=3, tokens=6)
    x_dtype = torch.float32 if cast else torch.float64
    whole = inputs(case, x_dtype, torch.float64)
    x, g = whole["x"].detach().double(), whole["g"]
    total = g @ whole["u"].detach() if sharding == "column_parallel" else x @ whole["v"].detach()
    bottleneck = Bottleneck(sharding, lambda _: total.clone)
    expected = plain(case, "fp64 products of fp32 inputs" if cast else "fp64")
    for rank in range(2):
        v = inputs(case, x_dtype, torch.float64)
        rows, columns = slice(6 * rank, 6 * rank + 6), slice(4 * rank, 4 * rank + 4)
        by_rows = sharding == "column_parallel"
        u, w = (v["u"][rows], v["v"]) if by_rows else (v["u"], v["v"][columns])
        residual = v["residual"][rows] if by_rows else v["residual"][:, columns]
        given = v["x"] if by_rows else v["x"][:, columns]
        y = fused_product.FusedSpectralProduct.apply(
            given, residual, u, w, v["sigma"], None, torch.float64, True, bottleneck
        )
        y.backward(g[:, rows] if by_rows else g)
        assert torch.allclose(v["sigma"].grad, expected["sigma"], rtol=1e-6)
        if by_rows:
            assert torch.allclose(v["v"].grad, expected["v"], rtol=1e-6)
            assert torch.allclose(v["u"].grad[rows], expected["u"][rows], rtol=1e-6)
        else:
            assert torch.allclose(v["u"].grad, expected["u"], rtol=1e-6)
            assert torch.allclose(v["v"].grad[columns], expected["v"][columns], rtol=1e-6)


def layer(**options: Any) -> SpectralLinear:
    """A layer with values."""
    torch.manual_seed(0)
    made = SpectralLinear(24, 40, 6, frozen_dtype=torch.bfloat16, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    made.ready = True
    return made


def trained_gradients(module: Any, spectral: SpectralLinear) -> list[Tensor]:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().square().sum().backward()
    found = [p.grad for p in spectral.parameters() if p.grad is not None]
    spectral.zero_grad()
    assert x.grad is not None
    return [y.detach(), x.grad, *found]


@pytest.fixture
def fused_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sst_forward, "FUSED_ON", {"cpu"})


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.slow
def test_one_graph_when_compiled() -> None:
    """Without a break, with and without checkpointing, and with equal results."""
    spectral = layer()
    spectral.casts = CastCache()
    expected = trained_gradients(spectral, spectral)
    compiled = torch.compile(spectral, backend="aot_eager", fullgraph=True)
    for found, value in zip(trained_gradients(compiled, spectral), expected, strict=True):
        assert difference({"": found}, {"": value}) < 3e-2
    again = trained_gradients(
        lambda x: torch.utils.checkpoint.checkpoint(spectral, x, use_reentrant=False), spectral
    )
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_casts_are_kept_until_a_parameter_changes() -> None:
    module, cache = layer(), CastCache()
    first = cache.get(module.factors(), torch.bfloat16)
    assert cache.get(module.factors(), torch.bfloat16) is first
    assert cache.get(module.factors(), torch.float16) is not first
    for leaf in ("u", "v", "sigma", "bias"):
        before = cache.get(module.factors(), torch.bfloat16)
        with torch.no_grad():
            getattr(module, leaf).mul_(2)
        after = cache.get(module.factors(), torch.bfloat16)
        assert after is not before, leaf
    assert after is not None
    assert torch.equal(after.u_OR, module.u.to(torch.bfloat16))
    assert torch.equal(after.v_sigma_IR, (module.v * module.sigma).to(torch.bfloat16))
    module.u.data.mul_(2)  # a change that no version tells
    assert cache.get(module.factors(), torch.bfloat16) is after
    cache.clear()
    assert cache.get(module.factors(), torch.bfloat16) is not after


def test_nothing_is_kept_in_inference_mode() -> None:
    module, cache = layer(), CastCache()
    with torch.inference_mode():
        assert cache.get(module.factors(), torch.bfloat16) is None
    kept = cache.get(module.factors(), torch.bfloat16)
    assert kept is not None and not kept.u_OR.is_inference()


@pytest.mark.usefixtures("fused_on_cpu")
def test_kept_casts_change_no_result() -> None:
    without, with_casts = layer(), layer()
    with_casts.casts = CastCache()
    for _ in range(2):
        found = trained_gradients(with_casts, with_casts)
        expected = trained_gradients(without, without)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def layer_on_a_gpu(kept: bool) -> dict[str, Any]:
    """Forward and backward of 2048 x 2048, r = 64, 8192 tokens under bf16 autocast, with bias; with
    `kept`, the second micro-batch of a step."""
    from spectral_scale.testing.launches import Launches

    spectral = SpectralLinear(2048, 2048, 64, frozen_dtype=torch.bfloat16, device="cuda")
    spectral.ready = True
    spectral.casts = CastCache() if kept else None
    for _ in range(2 if kept else 1):
        x = torch.randn(8192, 2048, device="cuda", requires_grad=True)
        with Launches() as counted:
            with torch.autocast("cuda", torch.bfloat16):
                y = spectral(x)
            y.backward(torch.empty_like(y))
        spectral.zero_grad()
    return counted.figures()


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize(("kept", "launches"), [(True, 12), (False, 17)])
def test_launches_and_bytes_on_a_gpu(kept: bool, launches: int) -> None:
    """Product by product it was 27 launches and 684 MB; a dense layer's are 10 and 512."""
    found = on_fake_cuda(layer_on_a_gpu, kept)
    assert found["launches"] <= launches
    assert found["megabytes"] <= (600 if kept else 605)
    assert found["waits"] == 0


def test_the_cpu_keeps_its_own_product() -> None:
    """Losses on the CPU stay as they are, to the bit."""
    assert sst_forward.FUSED_ON == {"cuda"}
