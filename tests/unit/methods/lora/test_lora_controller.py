"""ReLoRA*'s merge: the function stays, the state is gone, the gradient dips, nothing is silent."""

from typing import Any

import pytest
import torch
from torch import nn

from spectral_scale.config.schema import OptimizerConfig, SpectralConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.lora.controller import LowRankController
from spectral_scale.methods.lora.layer import convert_lora, lora_layers
from spectral_scale.methods.lr_ramp import ramp_learning_rates
from spectral_scale.methods.sst.layer import convert
from spectral_scale.optim.build import build_adamw, create_state
from spectral_scale.optim.groups import param_groups

T3 = 4
RELORA = SpectralConfig(
    method="relora", spectral_rank=2, steps_per_iteration=T3, iteration_warmup_steps=3, lora_alpha=4
)


def prepare(model: nn.Module, config: SpectralConfig = RELORA, **options: Any):
    """A converted model, its optimizer and its controller."""
    convert_lora(model, config, frozen_dtype=options.pop("frozen_dtype", None))
    groups = param_groups(model, lr=1e-2, spectral_lr=options.pop("spectral_lr", 1e-2))
    optimizer = build_adamw(groups, OptimizerConfig(lr=1e-2))
    create_state(optimizer)
    options.setdefault("base_dtype", torch.float64)
    return optimizer, LowRankController(model, optimizer, config, **options)


def test_a_merge_leaves_the_function_unchanged(stack, take_step) -> None:
    optimizer, controller = prepare(stack)
    x = torch.randn(8, 4, dtype=torch.float64)
    for number in range(T3 - 1):
        take_step(stack, optimizer, number)
        assert controller.after_step() is None
    take_step(stack, optimizer, T3)
    before = stack(x)
    weights = {n: m.effective_weight() for n, m in lora_layers(stack).items()}
    report = controller.after_step()
    assert report is not None and report.layers == 3 and report.merge == 1
    assert 0 < report.relative_update < 1
    torch.testing.assert_close(stack(x), before, rtol=1e-13, atol=1e-13)
    for name, layer in lora_layers(stack).items():
        assert not layer.lora_b.any()
        torch.testing.assert_close(layer.base.data, weights[name], rtol=1e-13, atol=1e-13)


def test_every_moment_and_step_of_the_factors_is_zeroed_and_no_other(stack, take_step) -> None:
    optimizer, controller = prepare(stack)
    report = None
    for number in range(T3):
        take_step(stack, optimizer, number)
        others = {
            p: {k: t.clone() for k, t in optimizer.state[p].items()}
            for g in optimizer.param_groups
            if not g["spectral"]
            for p in g["params"]
        }
        report = controller.after_step()
    factors = [p for m in lora_layers(stack).values() for p in (m.lora_a, m.lora_b)]
    for parameter in factors:
        assert all(not value.any() for value in optimizer.state[parameter].values())
    assert report is not None and report.moments_reset == 2 * sum(p.numel() for p in factors)
    for parameter, state in others.items():
        assert float(state["step"]) == T3
        for key, value in state.items():
            assert torch.equal(value, optimizer.state[parameter][key])


def test_the_gradient_of_lora_a_vanishes_right_after_a_merge(stack, take_step) -> None:
    """The dip of SST's theory: at B = 0 only B has a gradient, so half of the motion is gone."""
    optimizer, controller = prepare(stack)
    norms = []
    for number in range(2 * T3 + 1):
        take_step(stack, optimizer, number)
        layers = lora_layers(stack).values()
        norms.append((
            max(float(m.lora_a.grad.norm()) for m in layers),
            max(float(m.lora_b.grad.norm()) for m in layers),
        ))  # fmt: skip
        controller.after_step()
    for step, (norm_a, norm_b) in enumerate(norms):
        assert (norm_a == 0.0) == (step % T3 == 0), step
        assert norm_b > 0.0


def test_each_merge_draws_lora_a_anew_from_its_key(stack, take_step) -> None:
    optimizer, controller = prepare(stack, seed=5)
    drawn = [stack.layers[0].lora_a.detach().clone()]
    for number in range(2 * T3):
        take_step(stack, optimizer, number)
        if controller.after_step() is not None:
            drawn.append(stack.layers[0].lora_a.detach().clone())
    assert len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert len({tuple(m.lora_a.shape) for m in lora_layers(stack).values()}) == 2
    assert not torch.equal(stack.layers[1].lora_a, stack.layers[2].lora_a)


def merge_small_updates(frozen_dtype: torch.dtype | None, merges: int) -> tuple[float, float]:
    """Relative error of the base after many merges, each far below a bf16 step, and of W + sum
    kept in bf16 all along."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(16, 16, bias=False)])
    exact = model.layers[0].weight.detach().double().clone()
    rounded = exact.bfloat16()
    start = exact.clone()
    optimizer, controller = prepare(model, frozen_dtype=frozen_dtype, base_dtype=torch.float32)
    layer = model.layers[0]
    for merge in range(1, merges + 1):
        layer.lora_b.data.fill_(1e-5)
        product = 2.0 * layer.lora_b.double() @ layer.lora_a.double()
        product = product.detach()
        exact += product
        rounded = (rounded.double() + product).bfloat16()
        controller._merge(merge)
    base = next(iter(dict(controller.state_tensors()).values())).double()
    moved = (exact - start).norm()
    return float((base - exact).norm() / moved), float((rounded.double() - exact).norm() / moved)


def test_a_bf16_base_loses_no_small_merges() -> None:
    kept, naive = merge_small_updates(torch.bfloat16, 40)
    assert kept < 1e-3
    assert naive > 0.5  # what merging into the bf16 base would have lost


def test_an_exact_base_needs_no_second_copy(stack) -> None:
    _, controller = prepare(stack)
    assert controller.nbytes() == 0
    assert merge_small_updates(None, 40)[0] < 1e-3


def test_the_bf16_base_is_the_rounded_truth(stack) -> None:
    model = stack.float()
    _, controller = prepare(model, frozen_dtype=torch.bfloat16, base_dtype=torch.float32)
    truths = dict(controller.state_tensors())
    assert controller.nbytes() == sum(t.nbytes for t in truths.values()) > 0
    for name, layer in lora_layers(model).items():
        assert truths[f"base/{name}"].dtype == torch.float32
        assert torch.equal(layer.base, truths[f"base/{name}"].bfloat16())


def test_state_goes_into_a_fresh_controller(stack, take_step) -> None:
    optimizer, controller = prepare(stack)
    for number in range(T3 + 1):
        take_step(stack, optimizer, number)
        controller.after_step()
    saved = {name: tensor.clone() for name, tensor in controller.state_tensors()}
    for layer in lora_layers(stack).values():
        layer.base.data.zero_()
        layer.ready = False
    other = LowRankController(stack, optimizer, RELORA, base_dtype=torch.float64, initialise=False)
    other.load_state(saved.__getitem__, T3 + 1)
    assert other.applied_steps == T3 + 1 and other.lr_factor() == controller.lr_factor()
    for name, layer in lora_layers(stack).items():
        assert layer.ready and torch.equal(layer.base, saved[f"base/{name}"])


@pytest.mark.parametrize("own", [False, True])
def test_the_learning_rate_ramps_up_after_each_merge(stack, take_step, own: bool) -> None:
    optimizer, controller = prepare(stack, ramps=not own)
    if own:  # as a loop that sets the rates itself
        ramp_learning_rates(optimizer, controller.lr_factor)
    seen = []

    def spy(opt, *_):
        seen.append({g["name"]: g["lr"] for g in opt.param_groups})

    optimizer.register_step_pre_hook(spy)
    for number in range(T3 + 1):
        take_step(stack, optimizer, number)
        controller.after_step()
    ramp = [1 / 3, 2 / 3, 1.0, 1.0, 1 / 3]
    assert [line["low_rank"] for line in seen] == pytest.approx([1e-2 * f for f in ramp])
    assert {line["dense"] for line in seen} == {1e-2}
    assert {g["lr"] for g in optimizer.param_groups} == {1e-2}  # restored


def test_lora_never_merges_and_has_no_ramp(stack, take_step) -> None:
    config = SpectralConfig(method="lora", spectral_rank=2, steps_per_iteration=2)
    optimizer, controller = prepare(stack, config)
    bases = {n: m.base.detach().clone() for n, m in lora_layers(stack).items()}
    for number in range(6):
        assert controller.lr_factor() == 1.0
        take_step(stack, optimizer, number)
        assert controller.after_step() is None
    for name, layer in lora_layers(stack).items():
        assert torch.equal(layer.base, bases[name]) and layer.lora_b.any()
    assert set(dict(controller.state_tensors())) == {f"base/{name}" for name in bases}


def test_factors_the_optimizer_never_moves_are_an_error(stack, take_step) -> None:
    """Broken on purpose: the optimizer was built before the model was converted."""
    optimizer = torch.optim.AdamW(
        [{"params": list(stack.entry.parameters()), "lr": 1e-2, "spectral": True}]
    )
    convert_lora(stack, RELORA)
    controller = LowRankController(stack, optimizer, RELORA)
    take_step(stack, optimizer, 0)
    with pytest.raises(SpectralError, match="moved none of the 3 layers' factors"):
        controller.after_step()


def test_a_learning_rate_of_zero_is_no_error(stack, take_step) -> None:
    optimizer, controller = prepare(stack, spectral_lr=0.0)
    take_step(stack, optimizer, 0)
    assert controller.after_step() is None


def test_a_reset_that_misses_state_is_an_error(stack, take_step) -> None:
    """Broken on purpose: one factor is not in the optimizer, so its moments cannot be reset."""
    convert_lora(stack, RELORA)
    groups = param_groups(stack, lr=1e-2, spectral_lr=1e-2)
    next(g for g in groups if g["name"] == "low_rank")["params"].pop()
    optimizer = build_adamw(groups, OptimizerConfig())
    create_state(optimizer)
    controller = LowRankController(stack, optimizer, RELORA)
    with pytest.raises(SpectralError, match="touched 168 moments_reset, expected 188"):
        for number in range(T3):
            take_step(stack, optimizer, number)
            controller.after_step()


def test_a_model_without_lora_layers_is_refused(stack) -> None:
    convert(stack, SpectralConfig(spectral_rank=2))
    optimizer = torch.optim.AdamW(param_groups(stack, lr=1e-3, spectral_lr=1e-3))
    with pytest.raises(ConfigError, match="no LoRA layer"):
        LowRankController(stack, optimizer, RELORA)
