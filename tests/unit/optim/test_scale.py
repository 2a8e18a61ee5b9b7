"""SCALE against its rule written out: which matrices have momentum, and what is left to AdamW."""

import pytest
import torch
from torch import Tensor, nn

from spectral_scale.config.schema import OptimizerConfig
from spectral_scale.optim.build import create_state, state_tensors
from spectral_scale.optim.groups import kinds, param_groups
from spectral_scale.optim.scale import LAST, NORMALISED, build_scale

CONFIG = OptimizerConfig(name="scale", lr=0.01, spectral_lr=0.05, betas=(0.8, 0.95), eps=1e-6)


class Net(nn.Module):
    """An embedding, a matrix, a norm and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.embed(x))))


def opened() -> tuple[Net, torch.optim.Optimizer]:
    model = Net().double()
    groups = param_groups(model, lr=0.01, spectral_lr=0.05, weight_decay=0.3)
    optimizer = build_scale(groups, CONFIG, last="head.weight")
    create_state(optimizer)
    return model, optimizer


def normalised(gradient: Tensor) -> Tensor:
    columns = gradient.T  # one a row
    return torch.stack([c / c.norm() if c.any() else c for c in columns]).T


@pytest.mark.parametrize("other", [False, True])
def test_columns_of_gradients_are_normalised_and_the_last_layer_has_momentum(other: bool) -> None:
    """The broken twin normalises rows instead, or gives momentum to all, and is elsewhere."""
    model, optimizer = opened()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 2}
    momentum = torch.zeros_like(model.head.weight)
    twin = {n: w.clone() for n, w in weights.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, 5, (4, 3))).square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            gradient = parameter.grad.clone()
            if name == "head.weight":
                momentum = gradient = 0.8 * momentum + 0.2 * gradient
            decayed = weights[name] * (1 - 0.05 * 0.3)
            weights[name] = decayed - 0.05 * normalised(gradient)
            twin[name] = twin[name] * (1 - 0.05 * 0.3) - 0.05 * normalised(gradient.T).T
        optimizer.step()
    expected = twin if other else weights
    same = [torch.allclose(p, expected[n]) for n, p in model.named_parameters() if n in expected]
    assert len(same) == 3 and (not any(same) if other else all(same))


def test_the_state_is_one_momentum_and_adam_s_of_vectors() -> None:
    model, optimizer = opened()
    held = {n: set(optimizer.state[p]) for n, p in model.named_parameters()}
    adam = {"step", "exp_avg", "exp_avg_sq"}
    assert held == {
        "embed.weight": set(),
        "inner.weight": set(),
        "head.weight": {"momentum_buffer"},
        **dict.fromkeys(["inner.bias", "norm.weight", "norm.bias"], adam),
    }
    assert sum(t.numel() for t in state_tensors(optimizer)) == 35 + 2 * 15 + 3
    names = {group["name"]: group["fqns"] for group in optimizer.param_groups}
    assert names[NORMALISED] == ["embed.weight", "inner.weight"] and names[LAST] == ["head.weight"]
    assert set(kinds(optimizer.param_groups)) == {"dense", NORMALISED}


def test_rates_are_those_of_the_groups() -> None:
    _, optimizer = opened()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"dense_no_decay": 0.01, NORMALISED: 0.05, LAST: 0.05}
