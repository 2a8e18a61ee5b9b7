"""From the meta device to values: nothing left undefined, nothing that differs from plain models.

Memory that `to_empty` hands out is filled with NaN here, so that a value nobody wrote shows.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from spectral_scale.config.presets import PRESETS, Architecture, resolve_architecture
from spectral_scale.config.schema import ModelConfig, SpectralConfig
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.sst.layer import convert
from spectral_scale.models.attention import CAUSAL_SDPA, choose_attention
from spectral_scale.models.build import build_model, materialise
from spectral_scale.models.weights import (
    FolderWeights,
    InitialWeights,
    KeyedWeights,
    initialise_dense,
)
from spectral_scale.parallel.table import parameter_table

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
OPT = replace(PRESETS["opt-tiny"], **SMALL, ffn_size=64, embedding_size=32, max_positions=64)
OPT_POST_NORM = replace(OPT, embedding_size=16, pre_norm=False)
LLAMA = replace(
    PRESETS["llama-60m"], **SMALL, ffn_size=48, num_kv_heads=1, embedding_size=32, max_positions=64
)
LLAMA_TIED = replace(LLAMA, tied_embeddings=True)
ARCHITECTURES = {
    "opt": OPT,
    "opt-post-norm": OPT_POST_NORM,
    "llama-gqa": LLAMA,
    "llama-tied": LLAMA_TIED,
}
each_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys()
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN instead of what happened to be there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty_like(torch.ones(2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


def make(
    architecture: Architecture,
    weights: InitialWeights | None = None,
    *,
    config: ModelConfig | None = None,
    spectral: SpectralConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model with values, in the order in which a run builds one."""
    model = build_model(architecture, config or ModelConfig(), eos_token_id=0)
    if spectral is not None:
        convert(model, spectral, frozen_dtype=dtype)
    table = parameter_table(model)
    materialise(model, device=CPU, dtype=dtype)
    weights = weights or KeyedWeights(3)
    initialise_dense(model, table, weights)
    if spectral is not None:
        SpectralController(
            model,
            None,
            spectral,
            weights=lambda name: weights.get(f"{name}.weight", shape_of(model, name)),
            bank_dtype=dtype,
        )
    return model


def shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    layer = model.get_submodule(name)
    return layer.out_features, layer.in_features


def ids(length: int = 20) -> Tensor:
    return torch.randint(100, (2, length), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


@each_architecture
def test_every_parameter_has_its_keyed_value(architecture: Architecture) -> None:
    model = make(architecture)
    keyed = KeyedWeights(3)
    for fqn, parameter in model.named_parameters():
        assert torch.equal(parameter, keyed.get(fqn, tuple(parameter.shape))), fqn
    for name, buffer in model.named_buffers():
        assert buffer.isfinite().all(), name
    assert logits(model).isfinite().all()


@each_architecture
def test_an_unwritten_parameter_would_show(architecture: Architecture) -> None:
    """The broken twin: one weight is left out, and stays NaN."""
    model = build_model(architecture, ModelConfig(), eos_token_id=0)
    table = parameter_table(model)
    materialise(model, device=CPU, dtype=torch.float32)
    left_out = next(fqn for fqn in table if fqn.endswith("q_proj.weight"))
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            if fqn != left_out:
                parameter.copy_(KeyedWeights(3).get(fqn, tuple(parameter.shape)))
    assert [n for n, p in model.named_parameters() if p.isnan().any()] == [left_out]
    assert logits(model).isnan().any()


@each_architecture
@pytest.mark.parametrize("storage", ["residual", "factored"])
def test_conversion_changes_no_value(architecture: Architecture, storage: Any) -> None:
    """The converted model is the dense one in another form: weights, other values and logits."""
    dense = make(architecture, dtype=torch.float64)
    config = SpectralConfig(spectral_rank=4, storage=storage)
    converted = make(architecture, spectral=config, dtype=torch.float64)
    values = dict(dense.named_parameters())
    kept = 0
    for fqn, info in parameter_table(converted).items():
        if info.layer is None:
            assert torch.equal(converted.get_parameter(fqn), values[fqn]), fqn
            kept += 1
        elif fqn.endswith(".sigma"):
            weight = converted.get_submodule(info.layer).effective_weight()
            torch.testing.assert_close(weight, values[f"{info.layer}.weight"])
    converted_layers = len(values) - kept
    assert converted_layers == architecture.num_layers * (6 if architecture.family == "opt" else 7)
    torch.testing.assert_close(logits(converted), logits(dense), rtol=1e-6, atol=1e-6)


def test_weights_depend_on_seed_and_name_alone() -> None:
    keyed = KeyedWeights(3)
    first = keyed.get("a.weight", (4, 6))
    keyed.get("b.weight", (100, 100))
    torch.manual_seed(11)
    torch.rand(5)
    assert torch.equal(first, keyed.get("a.weight", (4, 6)))
    assert torch.equal(first, KeyedWeights(3).get("a.weight", (4, 6)))
    assert not torch.equal(first, keyed.get("c.weight", (4, 6)))
    assert not torch.equal(first, KeyedWeights(4).get("a.weight", (4, 6)))
    large = keyed.get("d.weight", (300, 400))
    assert float(large.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(large.mean())) < 2e-4


def test_a_deeper_model_keeps_the_weights_it_shares() -> None:
    """No value is drawn from a sequence that another layer could shift."""
    two, three = make(OPT), make(replace(OPT, num_layers=3))
    shared = dict(three.named_parameters())
    for fqn, parameter in two.named_parameters():
        assert torch.equal(parameter, shared[fqn]), fqn


@pytest.mark.parametrize("architecture", [OPT, OPT_POST_NORM, LLAMA_TIED], ids=str)
def test_tied_embeddings_stay_one_tensor(architecture: Architecture) -> None:
    model = make(architecture)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    names = [n for n, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    model.get_input_embeddings().weight.data[5] += 1
    assert torch.equal(model.lm_head.weight[5], model.get_input_embeddings().weight[5])


def test_untied_embeddings_stay_two() -> None:
    model = make(LLAMA)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_rotary_frequencies_are_those_of_a_plain_llama() -> None:
    plain = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, **PLAIN_LLAMA))
    model = make(LLAMA)
    expected, found = dict(plain.named_buffers()), dict(model.named_buffers())
    assert expected.keys() == found.keys() and expected
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name


def plain_model(architecture: Architecture, model: nn.Module) -> nn.Module:
    """What transformers itself builds of the same shapes, on real memory, with equal weights."""
    a = architecture
    common: dict[str, Any] = {
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_positions,
        "tie_word_embeddings": a.tied_embeddings,
    }
    plain: nn.Module
    if a.family == "opt":
        plain = OPTForCausalLM(
            OPTConfig(
                **common,
                ffn_dim=a.ffn_size,
                word_embed_proj_dim=a.embedding_size,
                do_layer_norm_before=a.pre_norm,
                pad_token_id=None,
            )
        )
    else:
        plain = LlamaForCausalLM(
            LlamaConfig(**common, intermediate_size=a.ffn_size, num_key_value_heads=a.num_kv_heads)
        )
    plain.load_state_dict(model.state_dict())
    return plain.eval()


PLAIN_LLAMA = {"num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 64}


@each_architecture
def test_logits_are_those_of_plain_transformers(architecture: Architecture) -> None:
    model = make(architecture).eval()
    torch.use_deterministic_algorithms(False)
    plain = plain_model(architecture, model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)
    with torch.no_grad():  # the comparison sees one changed weight
        next(p for n, p in plain.named_parameters() if "v_proj" in n).mul_(1.01)
    assert float((logits(model) - logits(plain)).abs().max()) > 1e-6


def test_logits_of_a_folder_are_those_of_its_own_model(saved: tuple[Any, Path]) -> None:
    """Grouped heads, rotary base, post-norm and projections, all through `model.path`."""
    plain, folder = saved
    config = ModelConfig(name=None, path=str(folder), sequence_length=32)
    model = make(resolve_architecture(config), FolderWeights(folder), config=config).eval()
    assert float(logits(plain).std()) > 0.01
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)


def test_randomness_comes_from_the_settings_alone(saved: tuple[Any, Path]) -> None:
    """A folder's own dropout rates are not taken over: two training passes are the same."""
    plain, folder = saved
    plain.config.attention_dropout = plain.config.dropout = plain.config.layerdrop = 0.5
    plain.config.save_pretrained(folder)
    config = ModelConfig(name=None, path=str(folder), sequence_length=32)
    model = make(resolve_architecture(config), FolderWeights(folder), config=config).train()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("architecture", [OPT, LLAMA], ids=["opt", "llama"])
@pytest.mark.parametrize("method", ["full", "sst"])
def test_recomputed_activations_give_the_same_gradients(
    architecture: Architecture, method: str
) -> None:
    spectral = SpectralConfig(spectral_rank=4) if method == "sst" else None
    gradients = []
    for recompute in (False, True):
        config = ModelConfig(activation_checkpointing=recompute)
        model = make(architecture, config=config, spectral=spectral)
        forwards = count_forwards(model)
        model(input_ids=ids()).logits.square().mean().backward()
        assert forwards() == (4 if recompute else 2)  # of two blocks
        trained = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
        assert all(grad is not None for _, grad in trained)
        gradients.append(dict(trained))
    for name, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][name]), name


def count_forwards(model: nn.Module) -> Any:
    """Counts passes through the blocks' attention from now on."""
    counted: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda *_: counted.append("pass"))
    return lambda: len(counted)


def test_frozen_weights_keep_their_precision() -> None:
    model = build_model(OPT, ModelConfig(), eos_token_id=0)
    convert(model, SpectralConfig(spectral_rank=4), frozen_dtype=torch.bfloat16)
    materialise(model, device=CPU, dtype=torch.float32)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_no_row_of_the_embedding_is_padding() -> None:
    """A published padding id would silently freeze an ordinary token's row."""
    for architecture in (OPT, LLAMA):
        model = make(architecture)
        assert model.get_input_embeddings().padding_idx is None


@each_architecture
def test_either_attention_gives_the_same_gradients(architecture: Architecture) -> None:
    found = {}
    for attention in ("sdpa", "eager"):
        config = ModelConfig(attention=attention)
        model = make(architecture, config=config, dtype=torch.float64)
        assert choose_attention(model, config, device=CPU, precision="fp64") == attention
        used = CAUSAL_SDPA if attention == "sdpa" else attention
        assert model.config._attn_implementation == used
        model(input_ids=ids()).logits.square().sum().backward()
        found[attention] = {n: p.grad for n, p in model.named_parameters()}
    # transformers' plain softmax is float32 whatever the model is.
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "precision", "length", "expected"),
    [
        ("cpu", "bf16", 512, "eager"),
        ("cpu", "bf16", 513, "sdpa"),
        ("cpu", "fp32", 512, "sdpa"),
        ("cuda", "bf16", 512, "sdpa"),
    ],
)
def test_attention_follows_what_is_fast(
    device: str, precision: str, length: int, expected: str
) -> None:
    config = ModelConfig(sequence_length=length)
    model = build_model(OPT, config, eos_token_id=0)
    chosen = choose_attention(model, config, device=torch.device(device), precision=precision)
    assert chosen == expected
