"""FRoD against the implementation in peft, at the same basis and positions."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.convert import merge
from spectral_scale.methods.frod.controller import FRoDController
from spectral_scale.methods.frod.joint_decomposition import column_lengths, inverse_lengths
from spectral_scale.methods.frod.layer import convert_frod, frod_layers
from spectral_scale.methods.frod.sparsity import Pattern

peft = pytest.importorskip("peft", minversion="0.21", reason="peft >= 0.21 has FRoD")

WIDTH, SPARSITY = 32, 0.05
CONFIG = SpectralConfig(method="frod", sparsity=SPARSITY)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.fc1 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) + self.fc1(x)[..., :WIDTH]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


@pytest.fixture
def both() -> tuple[Model, nn.Module]:
    """Our model and peft's, of the same weights; ours with peft's V and positions."""
    torch.manual_seed(0)
    dense = Model()
    reference = copy.deepcopy(dense)
    settings = peft.FrodConfig(
        target_modules=["q_proj", "fc1"], sparse_rate=SPARSITY, progressbar=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(reference, settings)
    convert_frod(dense, CONFIG)
    controller = FRoDController(dense, None, CONFIG)
    state: dict[str, Tensor] = {}
    for category in ("q_proj", "fc1"):
        v = adapted.base_model.frod_V[category]["default"].double()
        rows, columns = adapted.base_model.frod_s_indices[category]["default"]
        order = (columns * WIDTH + rows).argsort()
        state[f"frod/{category}/v"] = v
        state[f"frod/{category}/v_inverse_t"] = torch.linalg.inv(v).t()
        state[f"frod/{category}/positions"] = torch.stack([rows[order], columns[order]])
    bases = {n: layer.base.detach().clone() for n, layer in frod_layers(dense).items()}
    for name, base in bases.items():
        inverse = state[f"frod/{name.rpartition('.')[2]}/v_inverse_t"]
        state[f"frod/{name}/inverse_lengths"] = inverse_lengths(column_lengths(base, inverse))
    loaded = FRoDController(dense, None, CONFIG, weights=bases.__getitem__, decompose=False)
    loaded.load_state(state.__getitem__, 0)
    assert controller.layers.keys() == loaded.layers.keys()
    return dense, adapted


def give_coefficients(ours: Model, adapted: nn.Module) -> None:
    """The same random ones to both; peft's are in another order, and its lambda is not a change."""
    generator = torch.Generator().manual_seed(1)
    for name, layer in frod_layers(ours).items():
        theirs = adapted.base_model.model.get_submodule(name)
        rows, columns = theirs.frod_s_indices["default"]
        order = (columns * WIDTH + rows).argsort()
        values = 0.1 * torch.randn(layer.num_mixing, generator=generator)
        delta = 0.1 * torch.randn(WIDTH, generator=generator)
        layer.mixing.data.copy_(values)
        layer.value_delta.data.copy_(delta)
        theirs.frod_lambda_s_values["default"].data[order] = values
        theirs.frod_lambda_l["default"].data += delta


def test_the_same_decomposition() -> None:
    """V of the same weights, but for signs, in peft's single precision."""
    torch.manual_seed(0)
    dense = Model()
    from peft.tuners.frod.model import _projection_from_weights

    weights = [block.fc1.weight.detach() for block in dense.layers]
    expected = _projection_from_weights(weights, 1e-3)
    convert_frod(dense, CONFIG)
    FRoDController(dense, None, CONFIG)
    found = dense.layers[0].fc1.shared()[0].v
    signs = (found * expected).sum(0).sign()
    assert float((found - expected * signs).norm() / found.norm()) < 1e-3


def test_the_same_function_and_gradients(both: tuple[Model, nn.Module]) -> None:
    ours, adapted = both
    give_coefficients(ours, adapted)
    x = torch.randn(9, WIDTH)
    found, expected = ours(x), adapted(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    found.square().mean().backward()
    expected.square().mean().backward()
    for name, layer in frod_layers(ours).items():
        theirs = adapted.base_model.model.get_submodule(name)
        rows, columns = theirs.frod_s_indices["default"]
        order = (columns * WIDTH + rows).argsort()
        d_values = theirs.frod_lambda_s_values["default"].grad[order]
        torch.testing.assert_close(layer.mixing.grad, d_values, rtol=1e-4, atol=1e-7)
        d_lambda = theirs.frod_lambda_l["default"].grad
        torch.testing.assert_close(layer.value_delta.grad, d_lambda, rtol=1e-4, atol=1e-7)


def test_the_same_merged_weights(both: tuple[Model, nn.Module]) -> None:
    ours, adapted = both
    give_coefficients(ours, adapted)
    merged = adapted.merge_and_unload()
    assert merge(ours) == 8
    for name, expected in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=1e-5, atol=2e-6)


def test_other_positions_would_show(both: tuple[Model, nn.Module]) -> None:
    """The agreement is not one of small numbers: S at the transposed positions is another map."""
    ours, adapted = both
    give_coefficients(ours, adapted)
    layer = ours.layers[0].fc1
    basis, _ = layer.shared()
    flipped = basis.pattern.positions.flip(0)
    order = (flipped[1] * WIDTH + flipped[0]).argsort()
    object.__setattr__(basis, "pattern", Pattern(flipped[:, order], WIDTH))
    x = torch.randn(9, WIDTH)
    assert float((ours(x) - adapted(x)).detach().abs().max()) > 1e-2
