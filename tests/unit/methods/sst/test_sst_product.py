"""The fast product against the plain one, over storages, shapes, dtypes and layouts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_scale.methods.sst import product as sst_product
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.product import Bottleneck, SpectralProduct
from spectral_scale.methods.tensor_parallel_context import Sharding
from spectral_scale.ops import token_sums
from spectral_scale.ops.token_sums import BLOCK_ROWS, column_sums, sum_of_products
from spectral_scale.testing.oracle import PlainSpectralProduct


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product; (m, n) is the weight's shape."""

    m: int = 10
    n: int = 7
    r: int = 3
    tokens: int = 9
    storage: str = "residual"
    bias: bool = True
    enhanced: bool = True
    active_sigma_only: bool = False
    input_grad: bool = True
    contiguous: bool = True


CASES = {
    "residual": Case(),
    "factored": Case(storage="factored"),
    "active sigma": Case(storage="factored", active_sigma_only=True),
    "active sigma, no input gradient": Case(
        storage="factored", active_sigma_only=True, input_grad=False
    ),
    "no bias": Case(bias=False),
    "factored, no bias": Case(storage="factored", bias=False),
    "true partials": Case(enhanced=False),
    "factored, true partials": Case(storage="factored", enhanced=False),
    "no input gradient": Case(input_grad=False),
    "factored, no input gradient": Case(storage="factored", input_grad=False),
    "rank k": Case(r=7),
    "factored, rank k": Case(r=7, storage="factored"),
    "rank 1": Case(r=1),
    "one token": Case(tokens=1),
    "no token": Case(tokens=0),
    "factored, no token": Case(tokens=0, storage="factored"),
    "blocks of tokens": Case(tokens=2 * BLOCK_ROWS),
    "a last block of one": Case(tokens=2 * BLOCK_ROWS + 1, storage="factored"),
    "wide": Case(m=5, n=17, r=2),
    "odd": Case(m=33, n=31, r=13, tokens=129, storage="factored"),
    "one by one": Case(m=1, n=1, r=1),
    "strided": Case(contiguous=False),
    "factored, strided": Case(contiguous=False, storage="factored"),
}

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(case: Case, dtype: torch.dtype, trained_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the product by name, and the output's gradient as `g`."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int, kind: torch.dtype = dtype) -> Tensor:
        shape = (rows, columns) if case.contiguous else (columns, rows)
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)
        return value if case.contiguous else value.t()

    k = min(case.m, case.n)
    factored = case.storage == "factored"
    return {
        "x": random(case.tokens, case.n),
        "residual": None if factored else random(case.m, case.n),
        "u": random(case.m, case.r, trained_dtype),
        "v": random(case.n, case.r, trained_dtype),
        "u_fixed": random(case.m, k - case.r) if factored else None,
        "v_fixed": random(case.n, k - case.r) if factored else None,
        "sigma": random(1, k if factored else case.r, trained_dtype)[0].abs(),
        "bias": random(1, case.m, trained_dtype)[0] if case.bias else None,
        "g": random(case.tokens, case.m),
    }


def run(product: Any, case: Case, dtype: torch.dtype, trained: torch.dtype) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    values = inputs(case, dtype, trained)
    g = values.pop("g")
    leaves = [name for name in ("u", "v", "sigma", "bias") if values[name] is not None]
    leaves += ["x"] if case.input_grad else []
    for name in leaves:
        values[name].requires_grad_()
    y = product.apply(*values.values(), case.enhanced, case.active_sigma_only)
    y.backward(g)
    return {"y": y.detach()} | {name: values[name].grad for name in leaves}


def difference(case: Case, dtype: torch.dtype, trained: torch.dtype | None = None) -> float:
    """Largest error of the fast product against the plain one, relative to each value's scale."""
    fast = run(SpectralProduct, case, dtype, trained or dtype)
    plain = run(PlainSpectralProduct, case, dtype, trained or dtype)
    assert fast.keys() == plain.keys()
    worst = 0.0
    for name, expected in plain.items():
        assert fast[name].dtype == expected.dtype and fast[name].shape == expected.shape, name
        if expected.numel():
            scale = max(1e-30, float(expected.abs().max()))
            worst = max(worst, float((fast[name] - expected).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_oracle(case: Case, dtype: torch.dtype) -> None:
    assert difference(case, dtype) <= TOLERANCES[dtype]


@pytest.mark.parametrize("storage", ["residual", "factored"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_oracle_with_fp32_factors_and_bf16_products(storage: str, bias: bool) -> None:
    """What bf16 training does: gradients of factors arrive in fp32."""
    case = Case(m=40, n=24, r=6, tokens=300, storage=storage, bias=bias)
    assert difference(case, torch.bfloat16, torch.float32) <= TOLERANCES[torch.bfloat16]


def test_a_lost_block_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: sums that leave out their last block."""
    blocks = token_sums._blocks
    monkeypatch.setattr(token_sums, "_blocks", lambda tensor: blocks(tensor)[:-1])
    assert difference(CASES["a last block of one"], torch.float64) > 1e-3


def test_a_scaled_h_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: h scaled in place before its product with z is summed."""
    plain = sst_product.sum_of_products
    monkeypatch.setattr(sst_product, "sum_of_products", lambda h, z, d: plain(h.mul_(2), z, d))
    assert difference(CASES["factored"], torch.float64) > 1e-3


def test_sums_of_low_precision_tensors_are_full_precision() -> None:
    """Each token is added in fp32: 4096 ones in bf16 would stop at 256."""
    ones = torch.ones(4096, 3, dtype=torch.bfloat16)
    expected = torch.full((3,), 4096.0)
    assert torch.equal(column_sums(ones, torch.float32), expected)
    assert torch.equal(sum_of_products(ones, ones, torch.float32), expected)


def test_inputs_are_left_alone() -> None:
    """Work in place must not reach what the caller holds."""
    for storage in ("residual", "factored"):
        values = inputs(replace(Case(), storage=storage), torch.float64, torch.float64)
        before = {k: v.clone() for k, v in values.items() if v is not None}
        g = values.pop("g")
        for name in ("x", "u", "v", "sigma"):
            values[name].requires_grad_()
        SpectralProduct.apply(*values.values(), True, False).backward(g)
        values["g"] = g
        assert all(torch.equal(values[name], value) for name, value in before.items())


@pytest.mark.parametrize("storage", ["residual", "factored"])
def test_layer_under_autocast_trains_in_fp32(storage: str) -> None:
    """bf16 output; fp32 gradients that agree with fp32 training to bf16 rounding."""
    gradients = {}
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = SpectralLinear(24, 40, 6, storage=storage, frozen_dtype=precision)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
        layer.ready = True
        x = torch.randn(2, 70, 24, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            y = layer(x)
        assert y.dtype == precision and y.shape == (2, 70, 40)
        y.float().square().mean().backward()
        gradients[precision] = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
        gradients[precision]["x"] = x.grad
    for name, expected in gradients[torch.float32].items():
        found = gradients[torch.bfloat16][name]
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("sharding", ["column_parallel", "row_parallel"])
def test_the_sum_over_ranks_travels_beside_the_widest_product(
    sharding: Sharding, early: bool
) -> None:
    """It is started before dL/dx's part of the residual is computed and waited for after it, with
    the same gradients; the twin waits at once."""
    events: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.mm.default and tuple(args[1].shape) == (7, 5):
                events.append("g @ residual")
            return func(*args, **(kwargs or {}))

    def start(partial: Tensor) -> Callable[[], Tensor]:
        events.append("start")
        total = partial.clone() * 2

        def finish() -> Tensor:
            events.append("finish")
            return total

        if early:
            return finish
        total = finish()
        return lambda: total

    def gradients(bottleneck: Bottleneck) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (6, 5), "residual": (7, 5), "u": (7, 3), "v": (5, 3), "sigma": (3,)}
        values = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
        trained = [values[k].requires_grad_() for k in ("x", "u", "v", "sigma")]
        x, residual, u, v, sigma = values.values()
        y = SpectralProduct.apply(
            x, residual, u, v, None, None, sigma, None, True, False, bottleneck
        )
        with Products():
            y.sum().backward()
        return [t.grad for t in trained if t.grad is not None]

    found = gradients(Bottleneck(sharding, start))
    order = ["start", "g @ residual", "finish"] if early else ["start", "finish", "g @ residual"]
    assert events == order
    at_once = gradients(Bottleneck(sharding, lambda partial: lambda: partial * 2))
    assert len(found) == 4 and all(torch.equal(a, b) for a, b in zip(found, at_once, strict=True))
