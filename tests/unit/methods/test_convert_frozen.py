"""What trains beside the factors of a model whose dense rest is frozen."""

import pytest
import torch
from torch import nn

from spectral_scale import OptimizerConfig, SpectralConfig, galore_groups, param_groups
from spectral_scale.engine.methods import convert_model
from spectral_scale.errors import ConfigError
from spectral_scale.methods.convert import freeze_dense


class Head(nn.Module):
    """Two dense layers, not numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 3)


class Classifier(nn.Module):
    """Numbered blocks, and a head that was not pretrained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.classifier = Head()


def frozen(also: list[str]) -> nn.Module:
    model = Classifier()
    config = SpectralConfig(method="lora", spectral_rank=2, train_dense=False, train_also=also)
    convert_model(model, config, torch.bfloat16)
    return model


def test_a_named_head_trains_at_its_own_rate_beside_a_frozen_rest() -> None:
    groups = param_groups(frozen(["classifier"]), lr=0.1, spectral_lr=0.01)
    heads = {fqn for g in groups if g["lr"] == 0.1 for fqn in g["fqns"]}
    assert heads == {
        f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")
    }
    assert {g["name"] for g in groups if g["lr"] == 0.01} == {"low_rank"}


def test_without_a_name_nothing_else_trains() -> None:
    """The twin: the head is frozen, in the products' precision."""
    model = frozen([])
    assert {g["name"] for g in param_groups(model, lr=0.1, spectral_lr=0.01)} == {"low_rank"}
    assert model.classifier.out_proj.weight.dtype == torch.bfloat16
    assert frozen(["classifier"]).classifier.out_proj.weight.dtype == torch.float32


def test_a_name_that_nothing_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"names score.*\['embed', 'layers', 'classifier'\]"):
        freeze_dense(Classifier(), torch.float32, also=["classifier", "score"])


def test_galore_is_at_hand_for_own_loops() -> None:
    spectral = SpectralConfig(method="galore", spectral_rank=2)
    groups = galore_groups(Classifier(), spectral, OptimizerConfig())
    projected = next(g for g in groups if g.get("galore_rank") == 2)
    assert projected["fqns"] == ["layers.0.weight", "layers.1.weight"]
