"""The tangent layer: its function, its gradients, and what it keeps for the backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spectral_scale.config.methods.tangent import forms_weight
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.convert import merge
from spectral_scale.methods.tangent import product
from spectral_scale.methods.tangent.layer import TangentLinear, convert_tangent
from spectral_scale.methods.tangent.product import TangentProduct

SHAPES = {"square": (8, 8, 3), "tall": (10, 6, 2), "wide": (5, 9, 5), "one": (1, 1, 1)}


def filled(m: int, n: int, r: int, *, bias: bool = True, **kinds: Any) -> TangentLinear:
    """A layer whose every parameter is random."""
    torch.manual_seed(0)
    layer = TangentLinear(n, m, r, bias=bias, **({"dtype": torch.float64} | kinds))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    layer.ready = True
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_with_its_effective_weight(shape: str, bias: bool) -> None:
    layer = filled(*SHAPES[shape], bias=bias)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.effective_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_finite_differences(shape: str, tokens: int) -> None:
    """The true gradients: unlike SST's, none leaves a factor out."""
    layer = filled(*SHAPES[shape])
    x = torch.randn(tokens, layer.in_features, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = TangentProduct.apply(x, layer.base, c, d, layer.u0, layer.v0, bias)
        return y

    assert torch.autograd.gradcheck(function, (x, layer.c, layer.d, layer.bias))


def test_a_wrong_gradient_would_show() -> None:
    """The twin: x^T (g d) in the place of x^T (g u0) is no gradient of c."""

    class Wrong(TangentProduct):
        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            x, _, _, d, *_ = ctx.saved_tensors
            found = TangentProduct.backward(ctx, *grads)
            return (found[0], None, x.t() @ (grads[0] @ d), *found[3:])

    layer = filled(*SHAPES["tall"])
    x = torch.randn(4, layer.in_features, dtype=torch.float64)

    def function(c: Tensor) -> Tensor:
        y: Tensor = Wrong.apply(x, layer.base, c, layer.d, layer.u0, layer.v0, layer.bias)
        return y

    assert not torch.autograd.gradcheck(function, (layer.c,), raise_exception=False)


def test_gradients_of_factors_without_one_of_the_input() -> None:
    layer = filled(*SHAPES["wide"])
    x = torch.randn(6, layer.in_features, dtype=torch.float64)
    layer(x).sum().backward()
    found = layer.c.grad, layer.d.grad
    layer.c.grad = layer.d.grad = None
    layer(x.requires_grad_()).sum().backward()
    for one, other in zip(found, (layer.c.grad, layer.d.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_products_train_full_precision_factors(precision: torch.dtype) -> None:
    layer = filled(10, 6, 2, dtype=torch.float32, frozen_dtype=precision)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", precision):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == precision
    assert layer.c.grad is not None and layer.c.grad.dtype == torch.float32
    expected = nn.functional.linear(x, layer.effective_weight(), layer.bias)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("tokens", "expected"), [(4, [(4, 2)]), (7, [])])
def test_backward_keeps_at_most_one_number_a_vector_and_token(
    tokens: int, expected: list[tuple[int, int]]
) -> None:
    """Of what the forward pass makes, x v0 (tokens, r) where it is unmerged, else nothing."""
    layer = filled(10, 6, 2)
    kept: list[Tensor] = []
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    owned = {p.data_ptr() for p in (*layer.parameters(), x)}
    made = [t for t in kept if t.data_ptr() not in owned]
    assert [tuple(t.shape) for t in made] == expected
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in made)


def counted(tokens: int, m: int, n: int, r: int, dtype: torch.dtype, forms: bool) -> int:
    """Multiply-adds of a forward and a backward pass, as torch calls products."""
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    layer = filled(m, n, r, dtype=dtype)
    x = torch.randn(tokens, n, dtype=dtype, requires_grad=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        FlopCounterMode(display=False, custom_mapping=in_place) as counter,
    ):
        patch.setattr(product, "forms_weight", lambda *_: forms)
        layer(x).sum().backward()
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("tokens", [1, 5, 6, 40])
@pytest.mark.parametrize(("m", "n", "r"), [(8, 8, 3), (12, 6, 2), (5, 9, 1)])
def test_the_weight_is_formed_where_that_takes_fewer_multiplications(
    tokens: int, m: int, n: int, r: int
) -> None:
    """Both ways are counted; in half precision none is formed."""
    unmerged, formed = (counted(tokens, m, n, r, torch.float32, way) for way in (False, True))
    assert unmerged == tokens * (2 * m * n + 5 * r * (m + n))
    assert formed == tokens * (2 * m * n + 2 * r * (m + n)) + 4 * r * m * n
    assert forms_weight(tokens, (m, n), 4) is (formed < unmerged)
    assert not forms_weight(10**9, (m, n), 2)


def test_both_products_are_the_same() -> None:
    layer = filled(10, 6, 2)
    found = []
    for forms in (False, True):
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).requires_grad_()
        layer.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(product, "forms_weight", lambda *_, forms=forms: forms)
            y = layer(x)
        y.square().sum().backward()
        found.append([y, x.grad, layer.c.grad, layer.d.grad, layer.bias.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_formed_weight_in_half_precision_would_lose_small_updates() -> None:
    """The reason why none is formed there: of an update of 1e-4 the weight's size nothing stays."""
    layer = filled(32, 32, 2, bias=False, dtype=torch.float32, frozen_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.base.fill_(1.0)
        layer.c.mul_(1e-4)
        layer.d.mul_(1e-4)
        formed = product._formed(layer.base, layer.c, layer.d, layer.u0, layer.v0, torch.bfloat16)
    assert torch.equal(formed, layer.base)
    assert (layer.effective_weight() - layer.base).abs().mean() > 5e-5


def test_it_is_not_used_before_it_has_bases_and_merges_afterwards() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 8)])})
    convert_tangent(model, SpectralConfig(form="tangent", spectral_rank=2))
    layer = model["layers"][0]
    with pytest.raises(SpectralError, match="before its bases were installed"):
        layer(torch.randn(2, 6))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    layer.ready = True
    x = torch.randn(3, 6)
    before = layer(x)
    assert merge(model) == 1
    torch.testing.assert_close(model["layers"][0](x), before)
