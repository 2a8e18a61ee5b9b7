"""Megatron configurations and weight maps: no process group is needed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from spectral_scale.backends.megatron.gpt_config import megatron_architecture, megatron_settings
from spectral_scale.backends.megatron.gpt_state import (
    parameter_chunks,
    read_parameter,
    state_reader,
    to_megatron,
    to_transformers,
)
from spectral_scale.backends.megatron.gpt_weights import megatron_weights
from spectral_scale.config.presets import PRESETS
from spectral_scale.config.rules_tensor_parallel import allowed_sizes, tensor_parallel_problems
from spectral_scale.config.schema import ModelConfig
from spectral_scale.errors import ConfigError
from spectral_scale.models.build import build_model
from spectral_scale.parallel.shard_geometry import tiling_fault
from spectral_scale.parallel.tensor_parallel_table import local_rectangle, sharded_dimension

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
OPT = OPTConfig(**SIZES, num_attention_heads=4, ffn_dim=80, word_embed_proj_dim=48, dropout=0.0)
GQA = LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4, intermediate_size=80)
TIED = LlamaConfig(**SIZES, num_attention_heads=4, intermediate_size=80, tie_word_embeddings=True)
KINDS = {"opt": OPT, "llama-gqa": GQA, "llama-tied": TIED}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def random_state(config: Any) -> dict[str, Tensor]:
    """A state dict of the plain transformers model, tied weights once, every value different."""
    torch.manual_seed(3)
    model: Any = (OPTForCausalLM if config.model_type == "opt" else LlamaForCausalLM)(config)
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def maps(config: Any, parts: int, padded: int | None = None) -> list[dict[str, Any]]:
    a = megatron_architecture(config)
    return [
        megatron_weights(a, parts=parts, index=i, padded_vocab_size=padded) for i in range(parts)
    ]


@each_kind
@pytest.mark.parametrize(("parts", "padded"), [(1, None), (2, None), (4, None), (2, 128), (4, 104)])
def test_round_trip_is_bit_exact(config: Any, parts: int, padded: int | None) -> None:
    state = random_state(config)
    ranks = [(weights, to_megatron(weights, state)) for weights in maps(config, parts, padded)]
    back = to_transformers(ranks)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    elements = sum(sum(t.numel() for t in held.values()) for _, held in ranks)
    assert elements >= sum(t.numel() for t in state.values())


def test_another_number_of_ranks_reads_what_was_written() -> None:
    """Chunks of TP 4, moments included, are the file that TP 2 is read from."""
    state = random_state(GQA)
    saved: dict[str, Tensor] = {n: torch.full_like(t, torch.nan) for n, t in state.items()}
    for index, weights in enumerate(maps(GQA, 4)):
        held = to_megatron(weights, state)
        for name, weight in weights.items():
            if index and weight.replicated:
                continue
            for chunk in parameter_chunks(weight, held[name], name="optimizer/{fqn}/exp_avg"):
                fqn = chunk.name.split("/")[1]
                box = tuple(map(slice, chunk.offset, chunk.rectangle.end))
                saved[fqn][box] = chunk.tensor
    for weights in maps(GQA, 2):
        expected = to_megatron(weights, state)
        for name, weight in weights.items():
            assert torch.equal(read_parameter(weight, state_reader(saved)), expected[name])


def test_fused_rows_are_those_of_a_query_group() -> None:
    """8 heads in 4 groups on 2 ranks: the second holds groups 2 and 3, each q q k v."""
    state = random_state(GQA)
    held = to_megatron(maps(GQA, 2)[1], state)["decoder.layers.1.self_attention.linear_qkv.weight"]
    q, k, v = (state[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv")
    d = 6
    expected = [q[4 * d : 6 * d], k[2 * d : 3 * d], v[2 * d : 3 * d]]
    expected += [q[6 * d :], k[3 * d :], v[3 * d :]]
    assert torch.equal(held, torch.cat(expected))
    fc1 = to_megatron(maps(GQA, 2)[1], state)["decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = (state[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    assert torch.equal(fc1, torch.cat([gate[40:], up[40:]]))


def test_padding_is_zero_and_opt_keeps_its_first_two_positions() -> None:
    state = random_state(OPT)
    first, last = (to_megatron(weights, state) for weights in maps(OPT, 2, 128))
    words = last["embedding.word_embeddings.weight"]
    assert torch.equal(words[:36], state["model.decoder.embed_tokens.weight"][64:])
    assert not words[36:].any()
    positions = first["embedding.position_embeddings.weight"]
    assert torch.equal(positions, state["model.decoder.embed_positions.weight"])
    assert positions.shape[0] == 42


@each_kind
def test_maps_use_the_one_table_of_tensor_parallelism(config: Any) -> None:
    """A linear's rows or columns on a rank are those the table names, in one stretch."""
    for index, weights in enumerate(maps(config, 2)):
        found: dict[str, list[Any]] = {}
        for weight in weights.values():
            for region in weight.regions:
                found.setdefault(region.fqn, []).append(region)
        for fqn, regions in found.items():
            shape = regions[0].global_shape
            shard = local_rectangle(fqn, shape, parts=2, index=index)
            moved = [
                replace(r.logical, offset=tuple(map(int.__sub__, r.logical.offset, shard.offset)))
                for r in regions
            ]
            assert tiling_fault(moved, shard.shape) is None


def test_factors_are_sharded_where_their_weight_is() -> None:
    layer = "model.decoder.layers.0"
    assert {leaf: sharded_dimension(f"{layer}.fc1.{leaf}") for leaf in ("u", "v", "sigma")} == {
        "u": 0, "v": None, "sigma": None
    }  # fmt: skip
    assert {leaf: sharded_dimension(f"{layer}.fc2.{leaf}") for leaf in ("u", "v", "residual")} == {
        "u": None, "v": 0, "residual": 1
    }  # fmt: skip
    for unknown in (f"{layer}.experts.weight", f"{layer}.fc1.lora_a"):
        with pytest.raises(ConfigError, match="no rule for"):
            sharded_dimension(unknown)


def test_a_wrong_order_of_ranks_or_a_missing_one_is_seen() -> None:
    state = random_state(GQA)
    ranks = [(weights, to_megatron(weights, state)) for weights in maps(GQA, 2)]
    with pytest.raises(ConfigError, match="only 2400 of 4800 .* give the states of all ranks"):
        to_transformers(ranks[:1])
    swapped = [(ranks[0][0], ranks[1][1]), (ranks[1][0], ranks[0][1])]
    back = to_transformers(swapped)
    assert any(not torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ConfigError, match=r"rank 0 lacks \['output_layer.weight'\]"):
        del ranks[0][1]["output_layer.weight"]
        to_transformers(ranks)
    del state["model.norm.weight"]
    with pytest.raises(ConfigError, match="model.norm.weight of shape"):
        to_megatron(ranks[0][0], state)


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "opt-350m"])
def test_presets_have_a_configuration(name: str) -> None:
    """Every matrix element of the preset has one place, TP 2 where its shapes allow it."""
    architecture = PRESETS[name]
    model = build_model(architecture, ModelConfig(name=name, sequence_length=64), eos_token_id=0)
    parts = 2 if 2 in allowed_sizes(architecture, limit=2) else 1
    settings = megatron_settings(model.config, tensor_parallel=parts)
    assert settings.architecture == architecture
    weights = [megatron_weights(architecture, parts=parts, index=i) for i in range(parts)]
    shapes = {p.fqn: p.global_shape for weight in weights[0].values() for p in weight.regions}
    assert shapes == {fqn: tuple(p.shape) for fqn, p in model.named_parameters()}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(GQA.to_dict() | changes))


def opt(**changes: Any) -> OPTConfig:
    return OPTConfig(**(OPT.to_dict() | changes))


REFUSED: list[tuple[Any, int, list[str]]] = [
    (llama(attention_bias=True), 1, ["attention_bias=True", "False only"]),
    (llama(hidden_act="gelu"), 1, ["hidden_act='gelu'", "'silu' only"]),
    (
        llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        1,
        ["rope_type='linear'", "parallel.backend=fsdp2"],
    ),
    (opt(dropout=0.1), 1, ["dropout=0.1", "0.0 only"]),
    (
        opt(word_embed_proj_dim=32, do_layer_norm_before=False),
        1,
        ["embeddings of 32", "opt-350m", "norms follow"],
    ),
    (llama(), 3, ["divide the 8 attention heads", "6 or 9", "one of [1, 2, 4]"]),
    (llama(num_key_value_heads=2), 4, ["divide the 2 key and value heads", "one of [1, 2]"]),
    (llama(intermediate_size=81), 2, ["81 feed-forward features", "model.ffn_size to 80 or 82"]),
    (opt(vocab_size=101), 2, ["101 rows of the vocabulary", "model.vocab_size to 100 or 102"]),
    (llama(), 0, ["parallel.tensor_parallel=0 must be at least 1"]),
]


@pytest.mark.parametrize(("config", "parts", "words"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused_by_name(config: Any, parts: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        megatron_settings(config, tensor_parallel=parts)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_padding_makes_a_vocabulary_fit() -> None:
    settings = megatron_settings(opt(vocab_size=101), tensor_parallel=4, pad_vocabulary=True)
    assert settings.padded_vocab_size == 104
    assert settings.gpt["vocab_size"] == 104


def test_ranks_and_models_without_a_rule_are_refused() -> None:
    problems = list(tensor_parallel_problems(PRESETS["opt-tiny"], 2, world_size=3))
    assert problems == ["parallel.tensor_parallel=2 must divide the 3 ranks; one of [1, 3]"]
    with pytest.raises(ConfigError, match="model_type='gpt2'; supported: opt, llama"):
        from transformers import GPT2Config

        megatron_settings(GPT2Config())
    with pytest.raises(ConfigError, match="no rank 2 among 2"):
        megatron_weights(PRESETS["opt-tiny"], parts=2, index=2)
