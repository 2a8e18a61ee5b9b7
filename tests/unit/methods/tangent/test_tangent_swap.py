"""Swaps of the tangent form on one process: what changes, what stays, and what is refused."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectral_scale import SpectralConfig, param_groups
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.base import FollowsOpenSteps
from spectral_scale.methods.tangent.basis import SvdBasis, block, make_basis
from spectral_scale.methods.tangent.controller import TangentController
from spectral_scale.methods.tangent.layer import convert_tangent
from spectral_scale.methods.tangent.truth import OwnedWeights, update_norm

TakeStep = Callable[[nn.Module, torch.optim.Optimizer, int], float]
BASES = ["random", "svd"]
R, EVERY = 2, 3


def settings(basis: str = "random", **changes: Any) -> SpectralConfig:
    values: dict[str, Any] = {
        "form": "tangent",
        "basis": basis,
        "spectral_rank": R,
        "steps_per_iteration": EVERY,
        "iteration_warmup_steps": 2,
    }
    return SpectralConfig(**(values | changes))


def start(
    model: nn.Module, config: SpectralConfig, **options: Any
) -> tuple[torch.optim.Optimizer, TangentController]:
    convert_tangent(model, config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, spectral_lr=1e-2))
    dtype = {"weight_dtype": torch.float64}
    return optimizer, TangentController(model, optimizer, config, **(dtype | options))


def frozen(controller: TangentController, *leaves: str) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": layer.get_parameter(leaf).detach().clone()
        for name, layer in controller.layers.items()
        for leaf in leaves
    }


def test_the_blocks_of_a_round_take_every_column_once_first() -> None:
    rounds = [block(7, 3, i) for i in range(4)]
    assert [r for r, _ in rounds] == [0, 0, 0, 1]
    assert [p.tolist() for _, p in rounds] == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("basis", BASES)
def test_conversion_and_every_swap_leave_the_function(
    basis: str, stack: nn.Module, take_step: TakeStep
) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    before = stack(x)
    optimizer, controller = start(stack, settings(basis))
    torch.testing.assert_close(stack(x), before, rtol=1e-12, atol=1e-12)
    for number in range(1, 10):
        take_step(stack, optimizer, number)
        before = stack(x)
        report = controller.after_step()
        assert (report is None) == bool(number % EVERY)
        torch.testing.assert_close(stack(x), before, rtol=1e-12, atol=1e-12)
        for layer in controller.layers.values():
            assert bool(layer.c.any()) == bool(layer.d.any()) == (report is None)


def test_a_swap_that_forgot_a_factor_would_show(
    stack: nn.Module, take_step: TakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: without d v0^T in the merge, the function changes."""
    merge = OwnedWeights.merge
    monkeypatch.setattr(
        OwnedWeights, "merge", lambda self, n, c, d, u, v: merge(self, n, c, 0 * d, u, v)
    )
    x = torch.randn(5, 4, dtype=torch.float64)
    optimizer, controller = start(stack, settings())
    for number in range(1, EVERY + 1):
        take_step(stack, optimizer, number)
    before = stack(x)
    assert controller.after_step() is None and controller.after_step() is None
    controller.after_step()
    assert (stack(x) - before).abs().max() > 1e-6


@pytest.mark.parametrize("basis", BASES)
def test_bases_are_orthonormal_constant_inside_an_iteration_and_new_after_it(
    basis: str, stack: nn.Module, take_step: TakeStep
) -> None:
    optimizer, controller = start(stack, settings(basis))
    before = frozen(controller, "u0", "v0")
    for number in range(1, 2 * EVERY + 1):
        take_step(stack, optimizer, number)
        swapped = controller.after_step() is not None
        now = frozen(controller, "u0", "v0")
        for name, columns in now.items():
            assert torch.equal(columns, before[name]) is not swapped
            gram = columns.t() @ columns
            torch.testing.assert_close(gram, torch.eye(R).double(), rtol=0, atol=1e-12)
        before = now


def test_a_round_of_random_bases_spans_everything(stack: nn.Module) -> None:
    """The columns of all iterations of a round make up one orthonormal matrix; the next round's
    is another."""
    _, controller = start(stack, settings())
    square = "layers.1"  # 9 x 9: five iterations a round
    weight, basis = controller.weights[square].weight, controller.swap.basis

    def left(iteration: int) -> Tensor:
        return basis.vectors(square, weight, basis.draw(square, weight, iteration))[0]

    whole = torch.cat([left(i) for i in range(5)], dim=1)[:, :9]
    torch.testing.assert_close(whole.t() @ whole, torch.eye(9).double(), rtol=0, atol=1e-12)
    assert (left(5).t() @ left(0)).abs().max() < 1 - 1e-6


def test_singular_vectors_are_those_of_the_present_weight(
    stack: nn.Module, take_step: TakeStep
) -> None:
    optimizer, controller = start(stack, settings("svd"))
    for number in range(1, EVERY + 1):
        take_step(stack, optimizer, number)
        controller.after_step()
    for layer in controller.layers.values():
        image = layer.base @ layer.v0
        sigma = image.norm(dim=0)
        torch.testing.assert_close(image, layer.u0 * sigma, rtol=1e-9, atol=1e-9)


def test_counts_are_reported_and_logged(
    stack: nn.Module, take_step: TakeStep, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer, controller = start(stack, settings())
    with caplog.at_level(logging.INFO):
        for number in range(1, EVERY + 1):
            take_step(stack, optimizer, number)
            report = controller.after_step()
    factors = sum(n + m for n, m in ((6, 9), (9, 9), (9, 5))) * R
    assert report is not None
    found = report.metrics()
    assert found["spectral/layers"] == found["spectral/moved_layers"] == 3
    assert found["spectral/active_vectors"] == found["spectral/swapped_vectors"] == 3 * R
    assert found["spectral/moments_reset"] == 2 * factors
    assert found["spectral/redecomposed"] == 0 < found["spectral/relative_update"] < 1
    assert "3 layers, 6 vectors a side train (6 swapped in)" in caplog.text
    for layer in controller.layers.values():
        state = optimizer.state[layer.c]
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and not state["step"]


def test_a_swap_that_resets_nothing_is_an_error(stack: nn.Module, take_step: TakeStep) -> None:
    """The twin of the counts: the store reaches an optimizer that never steps."""
    config = settings()
    convert_tangent(stack, config)
    optimizer = torch.optim.AdamW(param_groups(stack, lr=1e-2, spectral_lr=1e-2))
    controller = TangentController(stack, None, config, weight_dtype=torch.float64)
    for number in range(1, EVERY):
        take_step(stack, optimizer, number)
        controller.after_step()
    with pytest.raises(SpectralError, match="touched 0 moments_reset, expected"):
        controller.after_step()


def test_a_store_that_writes_elsewhere_is_an_error(
    stack: nn.Module, take_step: TakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first swap reads everything back."""
    optimizer, controller = start(stack, settings())
    store: Any = controller.swap.store
    monkeypatch.setattr(store, "scatter", lambda values, *, owner: None)
    for number in range(1, EVERY):
        take_step(stack, optimizer, number)
        controller.after_step()
    with pytest.raises(SpectralError, match="installed 0 of 6 vectors"):
        controller.after_step()


def test_factors_that_are_not_finite_end_the_run_before_anything_is_written(
    stack: nn.Module, take_step: TakeStep
) -> None:
    optimizer, controller = start(stack, settings())
    before = {name: entry.weight.clone() for name, entry in controller.weights.items()}
    for number in range(1, EVERY):
        take_step(stack, optimizer, number)
        controller.after_step()
    with torch.no_grad():
        controller.layers["layers.0"].c[0, 0] = torch.nan
    with pytest.raises(SpectralError, match=r"layers\.0: its trained factors hold NaN"):
        controller.after_step()
    assert torch.equal(controller.weights["layers.0"].weight, before["layers.0"])


@pytest.mark.parametrize("basis", BASES)
def test_a_fresh_controller_takes_the_state_over_bit_for_bit(
    basis: str, stack: nn.Module, take_step: TakeStep
) -> None:
    """Inside an iteration, with another seed and schedule: the bases in use are the saved ones."""
    optimizer, controller = start(stack, settings(basis), seed=3)
    for number in range(1, EVERY + 2):
        take_step(stack, optimizer, number)
        controller.after_step()
    expected = frozen(controller, "base", "u0", "v0")
    saved = {name: tensor.clone() for name, tensor in controller.state_tensors()}
    assert len(saved) == 3 * (1 + len(controller.swap.basis.leaves))
    again = TangentController(
        stack,
        None,
        settings(basis, steps_per_iteration=2),
        seed=4,
        weight_dtype=torch.float64,
        initialise=False,
    )
    for layer in again.layers.values():
        for parameter in (layer.base, layer.u0, layer.v0):
            parameter.zero_()
    again.load_state(saved.__getitem__, EVERY + 1)
    for name, value in frozen(again, "base", "u0", "v0").items():
        assert torch.equal(value, expected[name]), name


def test_rounding_does_not_accumulate_in_the_layers_copy() -> None:
    """The layer's bf16 weight is the cast of the truth after every swap."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(16, 16)])})
    config = settings(steps_per_iteration=1)
    convert_tangent(model, config, frozen_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, spectral_lr=1e-4))
    controller = TangentController(model, optimizer, config)
    truth = controller.weights["layers.0"]
    first = truth.weight.clone()
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model["layers"][0](torch.randn(8, 16)).float().square().mean()
        loss.backward()
        optimizer.step()
        controller.after_step()
    assert truth.weight.dtype == torch.float32
    assert torch.equal(controller.layers["layers.0"].base, truth.weight.bfloat16())
    assert (truth.weight - first).abs().max() > 1e-5


def test_the_norm_of_an_update_is_that_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    u0, v0 = (
        torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64))[0]
        for n in (8, 6)
    )
    c, d = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (6, 8))
    expected = (u0 @ c.t() + d @ v0.t()).norm()
    torch.testing.assert_close(update_norm(c, d, u0, v0), expected)


def test_bytes_are_those_of_the_weights_and_keys(stack: nn.Module) -> None:
    _, controller = start(stack, settings())
    assert controller.nbytes() == 8 * (6 * 9 + 9 * 9 + 9 * 5) + 3 * 16


def test_draws_do_not_depend_on_anything_but_the_key() -> None:
    weight = torch.randn(12, 8)
    one, two = make_basis(settings(), 5), make_basis(settings(), 5)
    state = one.draw("layer", weight, 7)
    assert state["key"].tolist() == [5, 7]
    for a, b in zip(
        one.vectors("layer", weight, state), two.vectors("layer", 2 * weight, state), strict=True
    ):
        assert torch.equal(a, b)
    assert isinstance(make_basis(settings("svd"), 5), SvdBasis)
    np.testing.assert_array_equal(block(8, R, 7)[1], [6, 7])


def test_a_model_without_converted_layers_is_refused(stack: nn.Module) -> None:
    with pytest.raises(ConfigError, match="call convert_tangent"):
        TangentController(stack, None, settings())


def test_vectors_that_train_again_are_not_counted_as_new() -> None:
    """k = 5, r = 3: the second iteration of a round is filled up with a column of the first."""
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    random, drawn = make_basis(settings(spectral_rank=3), 0), make_basis(settings("svd"), 0)
    states = [random.draw("layer", weight, i) for i in range(3)]
    assert random.count_new(weight, states[0], states[1]) == 2
    assert random.count_new(weight, states[1], states[2]) == 3  # another round
    state = drawn.draw("layer", weight, 0)
    assert drawn.count_new(weight, state, state) == 0
    assert drawn.count_new(weight, state, drawn.draw("layer", weight, 1)) <= R


def test_only_a_swap_needs_to_know_whether_the_step_was_applied(
    stack: nn.Module, take_step: TakeStep
) -> None:
    optimizer, controller = start(stack, settings())
    assert isinstance(controller, FollowsOpenSteps)
    for step in range(1, EVERY + 1):
        take_step(stack, optimizer, step)
        before = frozen(controller, "base", "u0", "v0", "c", "d")
        needed = controller.needs_verdict()
        report = controller.after_step(None if needed else torch.ones(()))
        assert needed == (report is not None) == (step == EVERY)
        if not needed:
            after = frozen(controller, "base", "u0", "v0", "c", "d")
            assert all(torch.equal(after[k], v) for k, v in before.items())
