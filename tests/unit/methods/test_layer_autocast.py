"""Layers of every method under torch.autocast, as `nn.Linear` behaves there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import (
    FRoDController,
    SpectralConfig,
    SpectralController,
    TangentController,
    convert_tangent,
    param_groups,
)
from spectral_scale.methods.frod.layer import convert_frod
from spectral_scale.methods.layer import factored_layers
from spectral_scale.methods.lora.controller import LowRankController
from spectral_scale.methods.lora.layer import convert_lora
from spectral_scale.methods.sst.layer import convert

WIDTH = 24
METHODS: dict[str, tuple[Callable[..., object], Callable[..., object], SpectralConfig]] = {
    "SST, residual": (convert, SpectralController, SpectralConfig(spectral_rank=4)),
    "SST, extra sigma": (
        convert, SpectralController, SpectralConfig(spectral_rank=4, extra_sigma=3),
    ),
    "SST, factored": (
        convert, SpectralController, SpectralConfig(spectral_rank=4, storage="factored"),
    ),
    "tangent form": (
        convert_tangent, TangentController, SpectralConfig(form="tangent", spectral_rank=4),
    ),
    "LoRA": (convert_lora, LowRankController, SpectralConfig(method="lora", spectral_rank=4)),
    "FRoD": (convert_frod, FRoDController, SpectralConfig(method="frod", sparsity=0.05)),
}  # fmt: skip
PRECISIONS = [torch.bfloat16, torch.float16]


class Stack(nn.Module):
    """Two blocks of a linear and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH)}) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = torch.tanh(block["fc"](x))
        return x


def converted(name: str, model: nn.Module) -> tuple[torch.optim.Optimizer, object]:
    change, controller, config = METHODS[name]
    change(model, config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, spectral_lr=1e-2))
    return optimizer, controller(model, optimizer, config, seed=0)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_output_and_gradients_are_those_of_a_linear(name: str, precision: torch.dtype) -> None:
    """The start of every method is the dense function: same dtypes, values within rounding."""
    torch.manual_seed(0)
    dense, model = Stack(), Stack()
    model.load_state_dict(dense.state_dict())
    converted(name, model)
    found, inputs = [], torch.randn(5, WIDTH)
    for each in (dense, model):
        x = inputs.clone().requires_grad_()
        with torch.autocast("cpu", precision):
            y = each(x)
        y.float().square().mean().backward()
        found.append((y, x.grad))
    (expected, expected_grad), (y, grad) = found
    assert (
        (y.dtype, grad.dtype) == (expected.dtype, expected_grad.dtype) == (precision, torch.float32)
    )
    size = float(torch.finfo(precision).eps) * 8
    torch.testing.assert_close(y, expected, rtol=size, atol=size)
    torch.testing.assert_close(
        grad, expected_grad, rtol=4 * size, atol=4 * size * grad.abs().max().item()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_under_autocast(name: str, precision: torch.dtype) -> None:
    """With a gradient scaler in fp16, as Trainer and Accelerate do; weights stay fp32."""
    torch.manual_seed(0)
    model = Stack()
    optimizer, controller = converted(name, model)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == torch.float16)
    x, target = torch.randn(16, WIDTH), torch.rand(16, WIDTH) - 0.5
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", precision):
            loss = nn.functional.mse_loss(model(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        controller.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    layers = factored_layers(model).values()
    assert len(layers) == 2 and {p.dtype for layer in layers for p in layer.parameters()} == {
        torch.float32
    }
