"""One table says what a model family is made of; whoever meets an unknown family refuses it."""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from spectral_scale.backends.megatron import gpt_config
from spectral_scale.backends.megatron.gpt_weights import megatron_weights
from spectral_scale.config.families import FAMILIES, family_of
from spectral_scale.config.methods import method_spec
from spectral_scale.config.presets import (
    PRESETS,
    architecture_of,
    linear_shapes,
)
from spectral_scale.config.schema import ModelConfig, RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.models.build import MODELS, build_model, transformers_config
from spectral_scale.parallel.tensor_parallel_table import kind_of
from spectral_scale.plan.activations import activation_bytes
from spectral_scale.plan.inventory import Inventory
from spectral_scale.plan.tensor_parallel_traffic import _Passes

OF_FAMILY = {"opt": PRESETS["opt-tiny"], "llama": PRESETS["llama-60m"]}
UNKNOWN = replace(PRESETS["opt-tiny"], family="gpt2")
NOTHING = Inventory(items=(), matrices={}, architecture=UNKNOWN, method=method_spec("full"))


def test_every_table_has_every_family() -> None:
    assert FAMILIES.keys() == MODELS.keys() == gpt_config.MODELS.keys() == OF_FAMILY.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_describes_the_models_of_transformers(name: str) -> None:
    family, architecture = family_of(name), OF_FAMILY[name]
    model = build_model(architecture, ModelConfig(sequence_length=8), eos_token_id=None)
    parameters = dict(model.named_parameters())
    block = f"{family.base}.layers.0"
    shapes = linear_shapes(architecture)
    for linear in family.linears:
        fqn = f"{block}.{linear.path}"
        assert tuple(parameters[f"{fqn}.weight"].shape) == shapes[linear.name]
        assert (f"{fqn}.bias" in parameters) is family.bias
        assert kind_of(fqn) == linear.kind
    norms = [f"{block}.{family.attention_norm}", f"{block}.{family.mlp_norm}"]
    for norm in (*norms, f"{family.base}.{family.final_norm}"):
        assert (f"{norm}.bias" in parameters) is ("bias" in family.norm_leaves)
        assert kind_of(norm) == "whole"
    named = {f"{block}.{linear.path}" for linear in family.linears} | set(norms)
    assert {fqn.rpartition(".")[0] for fqn in parameters if fqn.startswith(block)} == named
    positions = f"{family.base}.embed_positions.weight"
    assert (positions in parameters) is (family.positions == "learned")
    if positions in parameters:
        rows = parameters[positions].shape[0]
        assert rows == architecture.max_positions + family.position_offset


@pytest.mark.parametrize("name", FAMILIES)
def test_config_json_says_what_the_preset_says(name: str) -> None:
    architecture = OF_FAMILY[name]
    made = transformers_config(architecture, ModelConfig(sequence_length=8), eos_token_id=None)
    assert architecture_of(made.to_dict()) == architecture


REFUSING: dict[str, Callable[[], object]] = {
    "the table": lambda: family_of("gpt2"),
    "shapes of linears": lambda: linear_shapes(UNKNOWN),
    "a model": lambda: build_model(UNKNOWN, ModelConfig(), eos_token_id=None),
    "its configuration": lambda: transformers_config(UNKNOWN, ModelConfig(), eos_token_id=None),
    "a Megatron model's shapes": lambda: gpt_config.megatron_architecture(
        SimpleNamespace(model_type="gpt2")  # type: ignore[arg-type]
    ),
    "Megatron's positions": lambda: gpt_config.position_rows(UNKNOWN),
    "Megatron's weights": lambda: megatron_weights(UNKNOWN, parts=1, index=0),
    "activations of a plan": lambda: activation_bytes(RunConfig(), UNKNOWN),
    "traffic of a plan": lambda: _Passes.of(RunConfig(), UNKNOWN, NOTHING),
}


@pytest.mark.parametrize("place", REFUSING)
def test_an_unknown_family_is_refused(place: str) -> None:
    words = r"there is no .* for model_type='gpt2'; supported: opt, llama; choose a model of"
    with pytest.raises(ConfigError, match=words):
        REFUSING[place]()


def test_an_unknown_model_type_of_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("model_type='gpt2'; supported: opt, llama")):
        architecture_of({"model_type": "gpt2"})
