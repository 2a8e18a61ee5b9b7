"""Every trainable parameter in exactly one group, with the rate and decay of its part."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from spectral_scale.config.presets import PRESETS
from spectral_scale.config.schema import ModelConfig, SpectralConfig
from spectral_scale.errors import ConfigError
from spectral_scale.methods.lora.layer import convert_lora
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.sst.layer import convert
from spectral_scale.models.build import build_model
from spectral_scale.optim.groups import group_kind, kinds, param_groups

RATES = {"lr": 0.1, "spectral_lr": 0.01, "weight_decay": 0.5}


def meta_model(name: str, method: str, storage: Any = "residual") -> nn.Module:
    model = build_model(PRESETS[name], ModelConfig(name=name), eos_token_id=None)
    config = SpectralConfig(spectral_rank=8, storage=storage)
    if method == "sst":
        convert(model, config)
    elif method == "lora":
        convert_lora(model, config)
    return model


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "llama-130m"])
@pytest.mark.parametrize("method", ["full", "sst", "lora"])
def test_groups_cover_what_trains_once(name: str, method: str) -> None:
    model = meta_model(name, method)
    groups = param_groups(model, **RATES)
    trained = {fqn: p for fqn, p in model.named_parameters() if p.requires_grad}
    listed = [fqn for group in groups for fqn in group["fqns"]]
    assert sorted(listed) == sorted(trained)
    for group in groups:
        assert [id(p) for p in group["params"]] == [id(trained[fqn]) for fqn in group["fqns"]]
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "llama-130m"])
@pytest.mark.parametrize("method", ["full", "sst", "lora"])
def test_only_dense_matrices_decay(name: str, method: str) -> None:
    model = meta_model(name, method)
    shapes = {fqn: p.ndim for fqn, p in model.named_parameters()}
    decayed = []
    for group in param_groups(model, **RATES):
        assert group["weight_decay"] == (0.5 if group["name"] == "dense" else 0.0)
        if group["weight_decay"]:
            decayed += group["fqns"]
    for fqn in decayed:
        assert shapes[fqn] == 2 and "norm" not in fqn and not fqn.endswith(".bias")
    if method != "full":  # the factors take the place of every matrix inside the blocks
        assert not any(".layers." in fqn for fqn in decayed)
    assert any("embed_tokens" in fqn for fqn in decayed)


def test_rates_follow_the_part() -> None:
    groups = {g["name"]: g for g in param_groups(meta_model("opt-tiny", "sst"), **RATES)}
    assert groups.keys() == {"dense", "dense_no_decay", "spectral_direction", "spectral_value"}
    for name, group in groups.items():
        spectral = name.startswith("spectral")
        assert group["spectral"] is spectral
        assert group["lr"] == group["base_lr"] == (0.01 if spectral else 0.1)
    assert all(fqn.endswith((".u", ".v")) for fqn in groups["spectral_direction"]["fqns"])
    assert all(fqn.endswith(".sigma") for fqn in groups["spectral_value"]["fqns"])
    low_rank = param_groups(meta_model("opt-tiny", "lora"), **RATES)
    assert {g["name"]: g["lr"] for g in low_rank}["low_rank"] == 0.01


def test_width_scaling_keeps_the_angle_of_a_step() -> None:
    """One group for each number of rows, at spectral_lr * sqrt(768 / rows)."""
    model = meta_model("llama-130m", "sst")
    groups = param_groups(model, **RATES, direction_lr_scaling="width")
    shapes = {fqn: p.shape for fqn, p in model.named_parameters()}
    found = {g["name"]: g for g in groups if group_kind(g["name"]) == "spectral_direction"}
    assert found.keys() == {"spectral_direction/768", "spectral_direction/2048"}
    for name, group in found.items():
        rows = int(name.split("/")[1])
        assert all(shapes[fqn][0] == rows for fqn in group["fqns"])
        assert group["base_lr"] == pytest.approx(0.01 * math.sqrt(768 / rows))
    others = [g for g in groups if g["name"] == "spectral_value"]
    assert others[0]["base_lr"] == 0.01
    assert list(kinds(groups)) == ["dense", "spectral_direction", "spectral_value"]
    assert len(kinds(groups)["spectral_direction"]) == 2


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    groups = param_groups(model, **RATES)
    assert [g["fqns"] for g in groups] == [["bias"]]
    model.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        param_groups(model, **RATES)


def test_a_shared_weight_trains_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

    groups = param_groups(Tied(), **RATES)
    assert [g["fqns"] for g in groups] == [["first.weight"]]
    assert isinstance(groups[0]["params"][0], torch.nn.Parameter)


def test_matrices_that_zero_has_sharded_stay_matrices() -> None:
    """ZeRO-3 leaves an empty parameter with its shape beside it; its weights still decay."""
    model = torch.nn.Linear(3, 4)
    model.weight.data, model.weight.ds_shape = torch.empty(0), torch.Size((4, 3))  # type: ignore[assignment]
    groups = {g["name"]: g for g in param_groups(model, lr=1.0, spectral_lr=1.0, weight_decay=0.1)}
    assert groups["dense"]["fqns"] == ["weight"] and groups["dense"]["weight_decay"] == 0.1
    assert groups["dense_no_decay"]["fqns"] == ["bias"]


def test_a_trained_number_without_dimensions_is_a_vector() -> None:
    """CLIP's logit scale and a Lorentz layer's are 0-dimensional."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.scale = nn.Parameter(torch.tensor(1.0))
    groups = {group["name"]: group for group in param_groups(model, **RATES)}
    assert groups["dense_no_decay"]["fqns"] == ["scale", "0.bias"]


def test_the_decay_of_sigma_is_that_of_the_weight() -> None:
    """One step of decay alone, with orthonormal directions of which all sigma train."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    before = model[0].weight.detach().clone()
    config = SpectralConfig(spectral_rank=2, storage="factored")
    convert(model, config)
    groups = param_groups(model, lr=0.1, spectral_lr=0.1, spectral_weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    controller = SpectralController(model, optimizer, config, bank_dtype=torch.float64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    factor = 1 - 0.1 * 0.5 * controller.lr_factor()
    torch.testing.assert_close(model[0].effective_weight(), factor * before)
