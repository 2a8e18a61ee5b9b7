"""An adapter's folder: the same function after loading, and refused where it does not belong."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_scale import FRoDController, SpectralConfig, convert_frod, load_adapter, save_adapter
from spectral_scale.errors import ConfigError
from spectral_scale.methods.convert import merge
from spectral_scale.methods.frod.adapter import FACTS_NAME, TENSORS_NAME
from spectral_scale.methods.frod.layer import frod_layers

WIDTH = 16
CONFIG = SpectralConfig(method="frod", sparsity=0.1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def dense() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def trained(dense: Model) -> nn.Module:
    model = copy.deepcopy(dense)
    convert_frod(model, CONFIG)
    FRoDController(model, None, CONFIG)
    for layer in frod_layers(model).values():
        layer.mixing.data.normal_(0, 0.1)
        layer.value_delta.data.normal_(0, 0.1)
    return model


@pytest.fixture
def folder(trained: nn.Module, tmp_path: Path) -> Path:
    assert save_adapter(trained, tmp_path / "adapter") == 3 * (25 + WIDTH)
    return tmp_path / "adapter"


def test_loading_gives_the_same_function(dense: Model, trained: nn.Module, folder: Path) -> None:
    x = torch.randn(4, WIDTH)
    assert list(load_adapter(dense, folder)) == ["layers.0", "layers.1", "layers.2"]
    assert torch.equal(dense(x), trained(x))
    assert dense.layers[0].basis is dense.layers[2].basis
    assert merge(dense) == 3
    assert torch.equal(dense(x), trained(x))


def test_it_holds_no_base_weight(folder: Path) -> None:
    stored = load_file(folder / TENSORS_NAME)
    assert sum(t.shape == (WIDTH, WIDTH) for t in stored.values()) == 2  # V and V^-T, once
    assert {p.name for p in folder.iterdir()} == {FACTS_NAME, TENSORS_NAME}


def test_a_rounded_base_is_still_its_own(dense: Model, folder: Path) -> None:
    load_adapter(dense.bfloat16(), folder)
    assert dense.layers[1].base.dtype == torch.bfloat16
    dense(torch.randn(2, WIDTH).bfloat16())


def test_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="was trained on other weights: the spectrum of layers.0"):
        load_adapter(Model(), folder)


def test_another_model_is_refused(dense: Model, folder: Path) -> None:
    dense.layers[2] = nn.Linear(WIDTH, 5)
    with pytest.raises(ConfigError, match=r"adapts layers.2, a linear layer of 16 x 16"):
        load_adapter(dense, folder)
    del dense.layers[2]
    with pytest.raises(ConfigError, match="the model has nothing there"):
        load_adapter(dense, folder)


def test_a_model_without_frod_has_no_adapter(dense: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no FRoD layer"):
        save_adapter(dense, tmp_path / "none")


def without_facts(folder: Path) -> None:
    (folder / FACTS_NAME).unlink()


def of_another_format(folder: Path) -> None:
    (folder / FACTS_NAME).write_text(json.dumps({"format": "other", "format_version": 1}))


def cut_off(folder: Path) -> None:
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:200])


def changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        stored = load_file(folder / TENSORS_NAME)
        change(stored)
        save_file(stored, folder / TENSORS_NAME)

    return damage


DAMAGE = {
    "no facts": (without_facts, "holds no FRoD adapter"),
    "other facts": (of_another_format, "not of format"),
    "cut off": (cut_off, "cannot be read"),
    "a tensor is missing": (changed(lambda t: t.pop("layers.1.mixing")), "lacks layers.1.mixing"),
    "another shape": (
        changed(lambda t: t.update({"layers.1.mixing": torch.zeros(3)})),
        "layers.1.mixing has shape",
    ),
    "not finite": (changed(lambda t: t["layers.0.value_delta"].fill_(torch.nan)), "not finite"),
    "outside": (changed(lambda t: t["layers/positions"].add_(WIDTH)), "out of range"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(
    damage: Callable[[Path], None], message: str, dense: Model, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_adapter(dense, folder)
    assert not frod_layers(dense)
