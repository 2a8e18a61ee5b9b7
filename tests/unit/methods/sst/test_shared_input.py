"""Layers with one input cast it once; on the CPU, where the product for GPUs is not chosen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_scale.methods.sst import forward as sst_forward
from spectral_scale.methods.sst.layer import SpectralLinear, forget_casts, keep_casts
from spectral_scale.methods.sst.layer import spectral_layers as layers_of
from spectral_scale.methods.sst.shared_input import SharedInput, with_one_input
from spectral_scale.testing.fake_cuda import missing, on_fake_cuda
from spectral_scale.testing.oracle import PlainSpectralProduct

WIDTH = 24


class Attention(nn.Module):
    """q, k and v of grouped-query attention, registered in another order than they are called."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"k_proj": (16, 6), "v_proj": (16, 4), "q_proj": (40, 6)}
        for name, (outputs, rank) in shapes.items():
            layer = SpectralLinear(WIDTH, outputs, rank, bias=bias, dtype=dtype)
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
            layer.ready = True
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """The three outputs, side by side."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def plain(attention: Attention, x: Tensor) -> Tensor:
    """The same, by the oracle."""
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    return torch.cat(
        [
            PlainSpectralProduct.apply(
                x.double().flatten(0, -2), layer.residual, layer.u, layer.v, None, None,
                layer.sigma, layer.bias, True, False,
            ).view(*x.shape[:-1], -1)
            for layer in layers
        ],
        -1,
    )  # fmt: skip


def gradients(function: Any, attention: Attention, x: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of every parameter that has one."""
    x = x.clone().requires_grad_()
    y = function(x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().sum().backward()
    found = [p.grad for p in attention.parameters() if p.grad is not None]
    attention.zero_grad()
    assert x.grad is not None
    return [y.detach(), x.grad, *found]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error relative to each value's scale."""
    assert len(found) == len(expected)
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 inputs are cast to the fp64 in which all products are taken."""
    monkeypatch.setattr(sst_forward, "FUSED_ON", {"cpu"})
    monkeypatch.setattr(sst_forward, "product_dtype", lambda x: torch.float64)


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, WIDTH, generator=generator) for _ in range(count)]


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each buffer that was filled."""
    fills: list[int] = []
    fill = SharedInput._fill

    def counted(self: SharedInput, x: Tensor, dtype: torch.dtype) -> None:
        fills.append(1)
        fill(self, x, dtype)

    monkeypatch.setattr(SharedInput, "_fill", counted)
    return fills


def shared_input(attention: Attention) -> SharedInput:
    member = attention.q_proj.member
    assert member is not None
    return member.shared


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_layers(bias: bool, filled: list[int]) -> None:
    """Two micro-batches of a step, then one after the parameters have changed."""
    attention = Attention(bias=bias)
    keep_casts(layers_of(attention))
    for i, x in enumerate(inputs(3)):
        expected = gradients(lambda x: plain(attention, x), attention, x)
        found = gradients(attention, attention, x)
        assert worst(found[:1] + found[2:], expected[:1] + expected[2:]) < 1e-12
        assert worst(found[1:2], expected[1:2]) < 1e-6  # of the input, in fp32
        assert len(filled) == i + 1
        assert shared_input(attention)._buffer is None, "a buffer outlives the layers' calls"
        if i == 1:
            for parameter in attention.parameters():
                parameter.data.mul_(1.5)  # a change that no version tells
            forget_casts(layers_of(attention))


@pytest.mark.usefixtures("in_double")
def test_recomputed_activations_are_the_same(filled: list[int]) -> None:
    attention = Attention()
    keep_casts(layers_of(attention))
    (x,) = inputs(1)
    expected = gradients(attention, attention, x)

    def recomputed(x: Tensor) -> Tensor:
        found: Tensor = torch.utils.checkpoint.checkpoint(attention, x, use_reentrant=False)
        return found

    assert worst(gradients(recomputed, attention, x), expected) == 0.0
    assert len(filled) == 1 + 2


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("checked", [True, False])
def test_only_the_very_same_input_is_shared(
    checked: bool, filled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-attention gives k and v another tensor, and a tensor may change between two calls. The
    twin does not look, and is wrong."""
    attention = Attention()
    keep_casts(layers_of(attention))
    x, other = inputs(2)
    expected = plain(attention, x)[..., :40], plain(attention, other)[..., 40:56]
    if not checked:
        monkeypatch.setattr(SharedInput, "_holds", lambda self, *_: self._buffer is not None)
    q, k = attention.q_proj(x), attention.k_proj(other)
    changed = x.clone()
    attention.q_proj(changed)
    changed.copy_(other)
    again = attention.k_proj(changed)
    right = [
        torch.allclose(a, b) for a, b in zip((q, k, again), (*expected, expected[1]), strict=True)
    ]
    assert right == [True, checked, checked]
    assert len(filled) == (4 if checked else 2)


@pytest.mark.usefixtures("in_double")
def test_nothing_is_shared_without_need() -> None:
    """In inference mode, and where the input needs no cast."""
    attention = Attention()
    keep_casts(layers_of(attention))
    (x,) = inputs(1)
    expected = plain(attention, x)
    with torch.inference_mode():
        assert torch.allclose(attention(x), expected)
    assert torch.allclose(attention(x.double()), expected)
    assert shared_input(attention)._v_IS is None


def test_who_shares() -> None:
    """By what the model families say of their linears; the others are on their own."""
    names = ["self_attn.k_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "other.q_proj", "attn.c_attn"]
    assert with_one_input([f"layers.{i}.{name}" for i in (0, 1) for name in names]) == [
        [f"layers.{i}.{name}" for name in group]
        for i in (0, 1)
        for group in (["self_attn.k_proj", "self_attn.q_proj"], ["mlp.gate_proj", "mlp.up_proj"])
    ]


def attention_on_a_gpu(shared: bool) -> dict[str, Any]:
    """Forward and backward of q, k and v of 2048 x 2048, r = 64, 8192 tokens, bf16 autocast, in the
    second micro-batch of a step."""
    from spectral_scale.testing.launches import Launches

    made = {
        name: SpectralLinear(2048, 2048, 64, frozen_dtype=torch.bfloat16, device="cuda")
        for name in ("a.q_proj", "a.k_proj", "a.v_proj")
    }
    keep_casts(made)
    for layer in made.values():
        layer.ready = True
        layer.member = layer.member if shared else None
    for _ in range(2):
        x = torch.randn(8192, 2048, device="cuda", requires_grad=True)
        with Launches() as counted:
            with torch.autocast("cuda", torch.bfloat16):
                outputs = [layer(x) for layer in made.values()]
            for y in outputs:
                y.backward(torch.empty_like(y))
        for layer in made.values():
            layer.zero_grad()
    return counted.figures()


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_launches_and_bytes_on_a_gpu() -> None:
    """Two casts and two products fewer, and the bytes of the input that they read."""
    shared, alone = (on_fake_cuda(attention_on_a_gpu, how) for how in (True, False))
    # Two of them add the gradients of the common input.
    assert (shared["launches"], alone["launches"]) == (34, 38)
    assert shared["megabytes"] <= alone["megabytes"] - 200
    assert shared["waits"] == 0
