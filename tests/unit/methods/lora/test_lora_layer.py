"""LoRA's layer: its function, its gradients, what trains, and its conversion both ways."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.convert import merge
from spectral_scale.methods.lora.controller import LowRankController
from spectral_scale.methods.lora.layer import (
    LoRALinear,
    convert_lora,
    draw_lora_a,
    lora_layers,
    lora_scaling,
)
from spectral_scale.optim.groups import param_groups
from spectral_scale.parallel.table import parameter_table

LORA = SpectralConfig(method="lora", spectral_rank=2, lora_alpha=3.0)


def random_layer(dtype: torch.dtype = torch.float64, **changes) -> LoRALinear:
    torch.manual_seed(1)
    layer = LoRALinear(7, 5, 3, scaling=0.5, dtype=dtype, **changes)
    for parameter in layer.parameters():
        parameter.data.normal_()
    layer.ready = True
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_the_function_is_that_of_the_effective_weight(bias: bool) -> None:
    layer = random_layer(bias=bias)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    expected = x @ (layer.base + 0.5 * layer.lora_b @ layer.lora_a).T
    expected = expected + layer.bias if bias else expected
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        layer.effective_weight(), layer.base + 0.5 * layer.lora_b @ layer.lora_a
    )


def test_gradients_by_finite_differences() -> None:
    layer = random_layer()
    names = ["lora_a", "lora_b", "bias"]
    inputs = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True)]
    inputs += [getattr(layer, name).detach().clone().requires_grad_() for name in names]

    def function(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-8)


def test_the_base_is_frozen_and_the_factors_train() -> None:
    layer = random_layer()
    layer(torch.randn(3, 7, dtype=torch.float64)).sum().backward()
    assert layer.base.grad is None
    assert all(getattr(layer, name).grad is not None for name in ("lora_a", "lora_b", "bias"))


def test_bf16_products_of_a_bf16_base_and_fp32_factors() -> None:
    layer = random_layer(torch.float32, frozen_dtype=torch.bfloat16)
    assert layer.base.dtype == torch.bfloat16 and layer.lora_a.dtype == torch.float32
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = x @ layer.effective_weight().T + layer.bias
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)
    y.sum().backward()
    assert layer.lora_a.grad.dtype == torch.float32


def test_a_layer_without_values_refuses_to_run() -> None:
    layer = LoRALinear(4, 4, 2)
    with pytest.raises(SpectralError, match="before its factors were drawn"):
        layer(torch.ones(1, 4))


def test_conversion_keeps_the_function_and_merge_brings_it_back(stack) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    before = stack(x)
    converted = convert_lora(stack, LORA)
    assert list(converted) == ["layers.0", "layers.1", "layers.2"]
    assert isinstance(stack.entry, nn.Linear)
    optimizer = torch.optim.AdamW(param_groups(stack, lr=1e-3, spectral_lr=1e-3))
    LowRankController(stack, optimizer, LORA)
    assert torch.equal(stack(x), before)  # lora_b is zero
    for layer in converted.values():
        layer.lora_b.data.normal_()
    trained = stack(x)
    assert merge(stack) == 3
    assert not lora_layers(stack) and isinstance(stack.layers[0], nn.Linear)
    torch.testing.assert_close(stack(x), trained)


def test_parts_and_groups(stack) -> None:
    convert_lora(stack, LORA)
    table = parameter_table(stack)
    assert table["layers.1.lora_a"].role == table["layers.1.lora_b"].role == "factor"
    assert table["layers.1.base"].role == "base" and not table["layers.1.base"].trainable
    assert table["layers.1.bias"].role == "vector" and table["layers.1.bias"].layer is None
    groups = {g["name"]: g for g in param_groups(stack, lr=1.0, spectral_lr=2.0, weight_decay=0.1)}
    factors = groups["low_rank"]
    assert len(factors["params"]) == 6
    assert (factors["lr"], factors["weight_decay"], factors["spectral"]) == (2.0, 0.0, True)
    assert groups["dense"]["fqns"] == ["entry.weight"]


def test_a_rank_that_does_not_fit_changes_nothing(stack) -> None:
    with pytest.raises(ConfigError, match=r"layers\.2 is 5 x 9: spectral_rank=6 exceeds 5"):
        convert_lora(stack, SpectralConfig(method="lora", spectral_rank=6))
    assert not lora_layers(stack)


def test_scaling_is_alpha_over_r() -> None:
    assert lora_scaling(LORA) == 1.5
    assert lora_scaling(SpectralConfig(method="lora", spectral_rank=8)) == 1.0


def test_the_start_of_lora_a_is_kaiming_uniform_and_keyed() -> None:
    drawn = draw_lora_a((64, 400), 0, "lora_a", "layers.0", 0)
    bound = 1 / math.sqrt(400)
    assert drawn.abs().max() <= bound
    assert abs(float(drawn.mean())) < 0.02 * bound
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(drawn, draw_lora_a((64, 400), 0, "lora_a", "layers.0", 0))
    for other in (
        (1, "lora_a", "layers.0", 0),
        (0, "lora_a", "layers.1", 0),
        (0, "lora_a", "layers.0", 1),
    ):
        assert not torch.equal(drawn, draw_lora_a((64, 400), *other))
