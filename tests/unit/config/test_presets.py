"""Shapes by name: built models have the published sizes, their linears the stated shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from spectral_scale.config.presets import (
    PRESETS,
    Architecture,
    linear_shapes,
    resolve_architecture,
)
from spectral_scale.config.schema import ModelConfig
from spectral_scale.errors import ConfigError
from spectral_scale.models.build import build_model

PUBLISHED_MILLIONS = {
    "opt-125m": 125.2,
    "opt-350m": 331.2,
    "opt-1.3b": 1315.8,
    "opt-2.7b": 2651.6,
    "opt-6.7b": 6658.5,
    "opt-13b": 12853.5,
    "opt-30b": 29974.5,
    "opt-66b": 65719.7,
    "llama-60m": 58.1,
    "llama-130m": 134.1,
    "llama-350m": 368.0,
    "llama-1b": 1339.1,
    "llama-7b": 6738.4,
}
"""Elements with tied weights once, as the released checkpoints and the literature's models have."""


def meta_model(name: str) -> Any:
    """A preset's model, without memory."""
    return build_model(PRESETS[name], ModelConfig(name=name), eos_token_id=None)


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_built_models_have_the_published_size(name: str) -> None:
    model = meta_model(name)
    assert all(tensor.is_meta for tensor in model.parameters())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        PUBLISHED_MILLIONS[name], abs=0.05
    )


@pytest.mark.parametrize("name", PRESETS)
def test_linear_shapes_are_those_of_every_block(name: str) -> None:
    """Also for the post-norm OPT-350M, whose projections lie outside the blocks."""
    expected = linear_shapes(PRESETS[name])
    blocks = next(m for m in meta_model(name).modules() if isinstance(m, nn.ModuleList))
    assert len(blocks) == PRESETS[name].num_layers
    for block in blocks:
        found = {
            child.rpartition(".")[2]: (module.out_features, module.in_features)
            for child, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        assert found == expected


def test_every_preset_is_covered() -> None:
    assert PUBLISHED_MILLIONS.keys() | {"opt-tiny"} == PRESETS.keys()


def test_opt_350m_projects_its_embedding_and_normalises_last() -> None:
    decoder = meta_model("opt-350m").model.decoder
    assert tuple(decoder.project_in.weight.shape) == (1024, 512)
    assert tuple(decoder.project_out.weight.shape) == (512, 1024)
    assert decoder.final_layer_norm is None
    assert not decoder.layers[0].do_layer_norm_before
    assert meta_model("opt-125m").model.decoder.layers[0].do_layer_norm_before


def test_building_the_largest_allocates_nothing() -> None:
    """132 GB of weights would end the process; the buffers that are real stay below a megabyte."""
    model = meta_model("opt-66b")
    assert sum(p.nbytes for p in model.parameters()) > 2.6e11
    real = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    assert sum(t.nbytes for t in real) < 1e6


def test_positions_are_overridden() -> None:
    found = resolve_architecture(ModelConfig(max_positions=64, sequence_length=64))
    assert found.max_positions == 64
    with pytest.raises(ConfigError, match="exceeds the model's 64 positions"):
        resolve_architecture(ModelConfig(max_positions=64, sequence_length=65))


def test_overrides_keep_the_ratios() -> None:
    found = resolve_architecture(ModelConfig(name="llama-130m", hidden_size=384, num_heads=6))
    assert (found.hidden_size, found.ffn_size, found.num_kv_heads) == (384, 1024, 6)
    assert found.embedding_size == 384
    found = resolve_architecture(ModelConfig(name="opt-tiny", ffn_size=100, num_layers=2))
    assert (found.hidden_size, found.ffn_size, found.num_layers) == (256, 100, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "opt-1.3"}, "did you mean opt-1.3b"),
        ({"name": "zzz"}, "known: opt-tiny"),
        ({"name": None}, "or give model.path"),
        ({"num_heads": 3}, "hidden size 256 is not divisible by 3 heads"),
        ({"name": "llama-60m", "hidden_size": 24, "num_heads": 8}, "even head size, not 24 / 8"),
        ({"name": "llama-60m", "dropout": 0.1}, "LLaMA has no residual dropout; set 0"),
        ({"sequence_length": 2000}, "lower it to at most 1024"),
    ],
)
def test_unusable_names_and_overrides(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_architecture(ModelConfig(**changes))


LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 80,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": False,
}


def folder(tmp_path: Path, config: Any) -> ModelConfig:
    """A model folder that holds `config` as config.json."""
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    return ModelConfig(name=None, path=str(tmp_path), sequence_length=32)


def test_shapes_of_a_folder(tmp_path: Path) -> None:
    found = resolve_architecture(folder(tmp_path, LLAMA))
    assert found == Architecture(
        family="llama", hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=80,
        vocab_size=100, max_positions=64, embedding_size=48, tied_embeddings=False,
    )  # fmt: skip
    assert linear_shapes(found)["k_proj"] == (24, 48)
    found = resolve_architecture(folder(tmp_path, OPT))
    assert (found.embedding_size, found.pre_norm, found.tied_embeddings) == (32, False, True)


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_a_folder_s_model_has_the_stated_linears(tmp_path: Path, config: dict[str, Any]) -> None:
    settings = folder(tmp_path, config)
    architecture = resolve_architecture(settings)
    model = build_model(architecture, settings, eos_token_id=None)
    linears = {
        name.rpartition(".")[2]: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers.0." in name
    }
    assert linears == linear_shapes(architecture)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "must hold an object"),
        ({"model_type": "gpt2"}, "model_type='gpt2'; supported: opt, llama"),
        ({}, "model_type=None"),
        ({"model_type": "opt"}, "lacks 'hidden_size'"),
        (OPT | {"hidden_size": "48"}, "hidden_size is '48', a whole number of at least 1"),
        (OPT | {"ffn_dim": 80.0}, "ffn_dim is 80.0, a whole number"),
        (LLAMA | {"vocab_size": True}, "vocab_size is True, a whole number"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0, a whole number"),
        (LLAMA | {"num_key_value_heads": 3}, "not divisible by 3 key and value heads"),
        (LLAMA | {"head_dim": 16}, "head_dim is 16; only .* = 12 is supported"),
        (LLAMA | {"max_position_embeddings": 16}, "lower it to at most 16"),
    ],
)
def test_unusable_folders(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_architecture(folder(tmp_path, config))


def test_a_folder_fixes_shapes_and_vocabulary(tmp_path: Path) -> None:
    settings = folder(tmp_path, LLAMA)
    with pytest.raises(ConfigError, match=r"model\.num_layers is also given; remove one"):
        resolve_architecture(ModelConfig(name=None, path=settings.path, num_layers=3))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=64, but .* has 100; use auto"):
        resolve_architecture(
            ModelConfig(name=None, path=settings.path, vocab_size=64, sequence_length=32)
        )
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        resolve_architecture(ModelConfig(name=None, path=str(tmp_path / "none")))
