"""Muon beside AdamW: which parameter steps how, against the rule written out and torch's Muon."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import SpectralConfig, param_groups
from spectral_scale.config.schema import OptimizerConfig, RunConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.base import standard_optimizer
from spectral_scale.methods.tangent.controller import TangentController
from spectral_scale.methods.tangent.layer import convert_tangent
from spectral_scale.ops.orthogonal import COEFFICIENTS
from spectral_scale.optim.build import create_state, obeys_flag, state_tensors
from spectral_scale.optim.muon import MATRICES, build_muon
from spectral_scale.parallel.collective import SingleProcess

CONFIG = OptimizerConfig(
    name="muon", lr=0.01, spectral_lr=0.02, muon_momentum=0.8, weight_decay=0.3
)


class Net(nn.Module):
    """A dense entry, a norm, and two numbered linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.entry = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.entry(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def opened(**spectral: Any) -> tuple[nn.Module, torch.optim.Optimizer, TangentController | None]:
    """A net, the optimizer of a run of it, and the controller if it is in the tangent form."""
    model = Net()
    config = RunConfig(optimizer=CONFIG, spectral=SpectralConfig(**spectral))
    tangent = config.spectral.form == "tangent"
    if tangent:
        convert_tangent(model, config.spectral)
    optimizer = standard_optimizer(model, config, SingleProcess())
    create_state(optimizer)
    if not tangent:
        return model, optimizer, None
    return model, optimizer, TangentController(model, optimizer, config.spectral, moments=1)


TANGENT = {"form": "tangent", "spectral_rank": 2, "steps_per_iteration": 3}


def backward(model: nn.Module, number: int) -> None:
    model.zero_grad()
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(number))
    model(x).square().mean().backward()


def orthogonalised(x: Tensor) -> Tensor:
    """The published iteration."""
    a, b, c = COEFFICIENTS
    x = x / x.norm()
    for _ in range(5):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def test_factors_step_by_orthogonalised_momentum() -> None:
    model, optimizer, controller = opened(**TANGENT, iteration_warmup_steps=0)
    assert controller is not None
    for layer in controller.layers.values():
        layer.c.data.normal_()  # else d has no gradient at first
    factors = {n: p for n, p in model.named_parameters() if n.endswith((".c", ".d"))}
    expected = {n: p.detach().clone() for n, p in factors.items()}
    momentum = {n: torch.zeros_like(p) for n, p in factors.items()}
    for number in range(2):
        backward(model, number)
        for name, p in factors.items():
            assert p.grad is not None
            momentum[name] = 0.8 * momentum[name] + 0.2 * p.grad
            average = 0.2 * p.grad + 0.8 * momentum[name]
            rate = 0.02 * 0.2 * math.sqrt(max(p.shape))
            expected[name] -= rate * orthogonalised(average)
        optimizer.step()
    for name, p in factors.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-5)
        state = optimizer.state[p]
        assert state.keys() == {"momentum_buffer"}
        torch.testing.assert_close(state["momentum_buffer"], momentum[name])
        # The root mean square of an update is 0.2 times the rate, as of Adam's.
        rms = (orthogonalised(momentum[name]) * 0.2 * math.sqrt(max(p.shape))).square().mean()
        assert 0.12 < rms.sqrt() < 0.26


def test_dense_matrices_are_torch_s_own_and_the_rest_adamw() -> None:
    model, optimizer, _ = opened(method="full")
    twin = Net()
    named = dict(twin.named_parameters())
    matrices = [p for n, p in named.items() if n in ("layers.0.weight", "layers.1.weight")]
    muon = torch.optim.Muon(
        matrices, lr=0.02, momentum=0.8, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    rest = {n: p for n, p in named.items() if not any(p is m for m in matrices)}
    decay = [p for p in rest.values() if p.ndim == 2]
    others = [p for p in rest.values() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
    for number in range(3):
        for net in (model, twin):
            backward(net, number)
        optimizer.step()
        muon.step()
        adam.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=0, atol=0, msg=name)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name[MATRICES]["fqns"] == ["layers.0.weight", "layers.1.weight"]
    assert by_name["dense"]["fqns"] == ["entry.weight"]
    kept = sum(p.numel() for p in matrices) + 2 * sum(p.numel() for p in rest.values()) + len(rest)
    assert sum(t.numel() for t in state_tensors(optimizer)) == kept


def test_a_rate_set_on_a_group_is_used() -> None:
    """The loop sets `lr` of the groups before each step; at 0 nothing moves."""
    model, optimizer, _ = opened(method="full")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model, 0)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_host_is_asked_before_a_step() -> None:
    """No kernel of Muon leaves a step out on the device."""
    assert not obeys_flag(opened(method="full")[1])


def test_a_swap_zeroes_the_momentum_of_the_factors_alone() -> None:
    model, optimizer, controller = opened(**TANGENT)
    assert controller is not None
    for number in range(3):
        backward(model, number)
        optimizer.step()
        report = controller.after_step()
    assert report is not None
    entries = {n: p.numel() for n, p in model.named_parameters() if n.endswith((".c", ".d"))}
    assert report.moments_reset == sum(entries.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            kept = any(value.any() for value in optimizer.state[p].values())
            assert kept is (name not in entries), name


def test_a_momentum_that_survived_would_show() -> None:
    """The twin: where the swap does not find Muon's moment, the counts disagree."""
    model, optimizer, controller = opened(**TANGENT)
    assert controller is not None
    controller.swap.moments = 2  # as of AdamW
    with pytest.raises(SpectralError, match="moments_reset"):
        for number in range(3):
            backward(model, number)
            optimizer.step()
            controller.after_step()


def test_state_is_made_in_the_first_step_where_nobody_made_it() -> None:
    model = Net()
    convert_tangent(model, SpectralConfig(**TANGENT))
    groups = param_groups(model, lr=0.01, spectral_lr=0.02)
    optimizer = build_muon(groups, CONFIG, matrices=())
    TangentController(model, optimizer, SpectralConfig(**TANGENT), moments=1)
    backward(model, 0)
    optimizer.step()
    assert sum("momentum_buffer" in state for state in optimizer.state.values()) == 4
