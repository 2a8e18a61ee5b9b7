"""A small stack of numbered linear blocks, in double precision, and one optimizer step on it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

SIZES = ((6, 9), (9, 9), (9, 5))
"""(in, out) of the blocks' linears: tall, square and wide matrices."""


class Stack(nn.Module):
    """A dense entry layer, then numbered blocks with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in SIZES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().double()


@pytest.fixture
def take_step() -> Callable[[nn.Module, torch.optim.Optimizer, int], float]:
    """Gradients of a batch that depends on the step alone, one optimizer step; the loss."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        dtype = next(model.parameters()).dtype
        x = torch.randn(16, 4, generator=generator).to(dtype)
        target = torch.randn(16, 5, generator=generator).to(dtype)
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
