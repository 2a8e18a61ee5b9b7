"""The optimizer's steps against Adam written out, and clipping against a hand computation."""

import math

import pytest
import torch
from torch import Tensor, nn

from spectral_scale.backends.torch.backend import TorchBackend
from spectral_scale.config.schema import OptimizerConfig, SpectralConfig
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.sst.layer import convert
from spectral_scale.optim.build import build_adamw, create_state
from spectral_scale.optim.groups import kinds, param_groups
from spectral_scale.parallel.rank_info import RankInfo

CONFIG = OptimizerConfig(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)


class Net(nn.Module):
    """Two dense matrices, a norm, and one block with a linear to convert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers[0](self.norm(self.first(x))))


def groups_of(model: nn.Module) -> list[dict]:
    return param_groups(model, lr=CONFIG.lr, spectral_lr=0.005, weight_decay=CONFIG.weight_decay)


def adamw(value: Tensor, gradients: list[Tensor], *, lr: float, decay: float) -> Tensor:
    """AdamW (Loshchilov and Hutter), one parameter, a loop over steps."""
    beta1, beta2 = CONFIG.betas
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for step, g in enumerate(gradients, start=1):
        value = value * (1 - lr * decay)
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g * g
        corrected = first / (1 - beta1**step)
        root = (second / (1 - beta2**step)).sqrt()
        value = value - lr * corrected / (root + CONFIG.eps)
    return value


def test_steps_are_adam_s_with_decoupled_decay_of_matrices() -> None:
    model = Net().double()
    optimizer = build_adamw(groups_of(model), CONFIG)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in start}
    for _ in range(4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
    for name, parameter in model.named_parameters():
        decay = CONFIG.weight_decay if parameter.ndim == 2 else 0.0
        expected = adamw(start[name], gradients[name], lr=CONFIG.lr, decay=decay)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
        other = adamw(start[name], gradients[name], lr=CONFIG.lr, decay=0.3 - decay)
        assert not torch.allclose(parameter.detach(), other, atol=1e-6)  # decay is seen


def test_the_whole_state_exists_before_the_first_step() -> None:
    model = Net()
    optimizer = build_adamw(groups_of(model), CONFIG)
    create_state(optimizer)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"].item() == 0
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == parameter.shape and not state[key].any()
    optimizer.state[model.norm.weight]["step"].fill_(3)
    create_state(optimizer)  # state that is there is left alone
    assert optimizer.state[model.norm.weight]["step"].item() == 3


def spectral_net() -> tuple[nn.Module, torch.optim.Optimizer, TorchBackend]:
    model = Net()
    config = SpectralConfig(spectral_rank=3)
    convert(model, config)
    optimizer = build_adamw(groups_of(model), CONFIG)
    SpectralController(model, optimizer, config)
    backend = TorchBackend(RankInfo(), "cpu")
    backend.shard(model)
    backend.attach(optimizer)
    return model, optimizer, backend


@pytest.mark.parametrize("limit", [0.5, 1e9, 0.0])
def test_each_kind_is_clipped_by_its_own_norm(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, backend = spectral_net()
    model(torch.randn(5, 6)).square().sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    seen: dict[str, Tensor] = {}

    def record() -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    monkeypatch.setattr(optimizer, "step", record)
    stats = backend.step(clip_grad_norm=limit)
    assert stats.applied
    assert stats.grad_norms.keys() == {"dense", "spectral_direction", "spectral_value"}
    for kind, groups in kinds(optimizer.param_groups).items():
        fqns = [fqn for group in groups for fqn in group["fqns"]]
        norm = math.sqrt(sum(float(before[fqn].double().square().sum()) for fqn in fqns))
        assert float(stats.grad_norms[kind]) == pytest.approx(norm, rel=1e-5)
        scale = min(1.0, limit / norm) if limit else 1.0
        for fqn in fqns:
            torch.testing.assert_close(seen[fqn], before[fqn] * scale, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())


def test_one_kind_s_large_gradient_leaves_the_others_alone() -> None:
    """The broken twin clips everything by one norm, which would shrink the small gradients too."""
    scales = {}
    for factor in (1.0, 1000.0):
        model, optimizer, backend = spectral_net()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                large = factor if name.startswith("first") else 1.0
                parameter.grad = torch.full_like(parameter, 0.01 * large)
        backend.step(clip_grad_norm=1.0)
        state = optimizer.state[model.get_parameter("layers.0.u")]
        scales[factor] = state["exp_avg"].clone()
    assert torch.equal(scales[1.0], scales[1000.0]) and scales[1.0].any()
    everything = [torch.full((8, 6), 10.0), torch.full((8, 3), 0.01)]
    assert float(torch.nn.utils.get_total_norm(everything)) > 1.0  # a joint norm would shrink
