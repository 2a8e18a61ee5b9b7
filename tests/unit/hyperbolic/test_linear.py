"""What holds of Sparse Spectral Training inside a Lorentz linear layer, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import SpectralConfig, SpectralController, convert, merge, param_groups
from spectral_scale.errors import ConfigError
from spectral_scale.hyperbolic import LorentzLinear, exp_at_origin, minkowski

T3 = 3


def points(features: int, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(features)
    return exp_at_origin(torch.randn(count, features - 1, generator=generator).double())


def made(inputs: int, outputs: int, **options: Any) -> LorentzLinear:
    torch.manual_seed(0)
    return LorentzLinear(inputs, outputs, **options).double()


def upstream(y: Tensor) -> Tensor:
    """The gradient with respect to the output."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).double()


def off(x: Tensor) -> float:
    return float((minkowski(x, x) + 1).abs().max())


def gradients(layer: LorentzLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dW and dL/db of a dense layer."""
    y = layer(x)
    (y * upstream(y)).sum().backward()
    weight, bias = layer.linear.weight.grad, layer.linear.bias.grad
    assert weight is not None and bias is not None
    return weight, bias


def test_outputs_lie_on_the_hyperboloid() -> None:
    layer, x = made(12, 9), points(12)
    assert off(layer(x)) < 1e-9
    assert off(layer.linear(x)) > 1  # the twin: z itself does not


def test_heads_are_points() -> None:
    split, joined = made(12, 8, out_heads=2), made(8, 12, in_heads=2, bias=False)
    y = split(points(12))
    assert y.shape == (40, 2, 4) and off(y) < 1e-9
    assert off(joined(y, extra=points(12))) < 1e-9
    zeroed = (joined.linear.weight == 0).all(dim=0).nonzero().flatten()
    assert zeroed.tolist() == [0, 4]  # the time of each head that is joined
    with pytest.raises(ConfigError, match="12 features cannot be 5 points"):
        made(12, 12, out_heads=5)


def test_rows_of_space_have_a_gauge() -> None:
    """Scaled together with b they change nothing, so the gradient is orthogonal to them."""
    layer, x = made(12, 9), points(12)
    with torch.no_grad():
        layer.linear.bias.normal_()
    gradient, of_bias = gradients(layer, x)
    weight, bias = layer.linear.weight.detach(), layer.linear.bias.detach()
    along = (weight[1:] * gradient[1:]).sum() + (bias[1:] * of_bias[1:]).sum()
    assert abs(float(along)) < 1e-11 * float(gradient.norm())
    before = layer(x).detach()
    with torch.no_grad():
        layer.linear.weight[1:] *= 7
        layer.linear.bias[1:] *= 7
        torch.testing.assert_close(layer(x), before)
        layer.linear.weight[0] *= 7  # the twin: the row of the time has none
        assert (layer(x) - before).abs().max() > 1e-3
    time = (weight[0] * gradient[0]).sum()
    assert abs(float(time)) > 1e-6 * float(gradient.norm())


@pytest.mark.parametrize("projected", [True, False])
def test_the_gradient_has_a_closed_form(projected: bool) -> None:
    """dL/dz in formulas; the twin leaves out the projection that the stretching causes."""
    layer, x = made(12, 9), points(12)
    gradient, _ = gradients(layer, x)
    with torch.no_grad():
        z, y = layer.linear(x), layer(x)
        delta, time = upstream(y), y[:, :1]
        n, reach = z[:, 1:] / z[:, 1:].norm(dim=1, keepdim=True), (time.square() - 1).sqrt()
        along = (n * delta[:, 1:]).sum(1, keepdim=True)
        slope = layer.log_reach.exp() * z[:, :1].sigmoid() * (1 - z[:, :1].sigmoid())
        of_time = slope * (delta[:, :1] + time / reach * along)
        across = delta[:, 1:] - n * along if projected else delta[:, 1:]
        of_space = reach / z[:, 1:].norm(dim=1, keepdim=True) * across
        formula = torch.cat([of_time, of_space], 1).t() @ x
    close = torch.allclose(formula, gradient, rtol=1e-9, atol=1e-9)
    assert close == projected


def spectral(layer: LorentzLinear, gradient: str, rank: int) -> nn.Module:
    """The layer in a numbered block, with all its triplets in training if the rank allows it."""
    model = nn.Sequential(layer)
    config = SpectralConfig(spectral_rank=rank, storage="factored", gradient=gradient)
    convert(model, config)
    SpectralController(model, None, config, bank_dtype=torch.float64)
    return model


@pytest.mark.parametrize("form", ["enhanced", "default"])
def test_the_gradients_of_v_hold_that_of_the_weight(form: str) -> None:
    """G = U dV^T with enhanced gradients, and not with the default ones."""
    dense, x = made(12, 9), points(12)
    expected, _ = gradients(dense, x)
    model = spectral(made(12, 9), form, 9)
    y = model(x)
    (y * upstream(y)).sum().backward()
    layer = model[0].linear
    product = layer.u.detach() @ layer.v.grad.t()
    assert torch.allclose(product, expected, rtol=1e-9, atol=1e-9) == (form == "enhanced")


@pytest.mark.parametrize("form", ["enhanced", "default"])
def test_the_triplet_of_the_time_column_turns_with_enhanced_gradients_only(form: str) -> None:
    """A square W starts with sigma_k = 0 and v_k the axis of the input's time."""
    model = spectral(made(9, 9), form, 9)
    layer, x = model[0].linear, points(9)
    assert float(layer.sigma[-1].detach() / layer.sigma[0].detach()) < 1e-12
    assert float(layer.v[0, -1].detach().abs()) == pytest.approx(1)
    y = model(x)
    (y * upstream(y)).sum().backward()
    turn, others = layer.u.grad[:, -1].norm(), layer.u.grad[:, :-1].norm()
    assert float(layer.sigma.grad[-1].abs()) > 1e-3
    assert float(turn / others) > 1e-3 if form == "enhanced" else float(turn / others) < 1e-12


@pytest.mark.parametrize("storage", ["factored", "residual"])
@pytest.mark.parametrize("rounds", [1, 2], ids=["re-SVD", "swap"])
def test_swaps_and_merging_leave_the_function(storage: str, rounds: int) -> None:
    model, x = nn.Sequential(made(12, 9), made(9, 9, activation=torch.relu)), points(12)
    config = SpectralConfig(
        spectral_rank=2,
        storage=storage,
        steps_per_iteration=T3,
        iterations_per_round=rounds,
        iteration_warmup_steps=0,
    )
    before = model(x)
    assert list(convert(model, config)) == ["0.linear", "1.linear"]
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, spectral_lr=1e-2))
    controller = SpectralController(model, optimizer, config, bank_dtype=torch.float64)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    for number in range(T3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if number == T3 - 1:
            names = [f"{n}.{leaf}" for n in controller.layers for leaf in ("u", "v")]
            controller.store.retract_columns(names)
            controller.store.clamp_nonnegative(f"{n}.sigma" for n in controller.layers)
            before = model(x).detach()
        report = controller.after_step()
    assert report is not None and report.redecomposed == (2 if rounds == 1 else 0)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert merge(model) == 2 and type(model[0].linear) is nn.Linear
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_points_are_made_in_float32_at_least() -> None:
    layer, x = made(12, 9).float(), points(12).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32 and off(y.double()) < 1e-3
