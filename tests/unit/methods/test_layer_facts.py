"""What model code may ask a converted layer, and what conversion says of dense weights."""

import logging
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

from spectral_scale import SpectralConfig, SpectralController, convert, merge, param_groups
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.convert import dense_block_weights
from spectral_scale.methods.sst.layer import SpectralLinear

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            decoder_start_token_id=0,
        )
    ),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=64)
    ),
    "Mamba-2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(**SMALL, num_heads=4, head_dim=16, state_size=8, n_groups=1)
    ),
}  # fmt: skip


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(
        **SMALL,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return hf.MixtralForCausalLM(config)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_peek_at_their_linears_train_swap_and_merge(name: str) -> None:
    torch.manual_seed(0)
    model, config = MODELS[name]().eval(), SpectralConfig(spectral_rank=4, steps_per_iteration=1)
    ids = torch.randint(3, 60, (2, 12))
    dense = model(input_ids=ids, labels=ids).loss
    convert(model, config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, spectral_lr=1e-3))
    controller = SpectralController(model, optimizer, config, seed=0)
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)
    loss.backward()
    optimizer.step()
    assert controller.after_step() is not None
    swapped = model(input_ids=ids, labels=ids).loss
    merge(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, swapped, rtol=1e-5, atol=1e-5)


def test_a_layer_answers_for_its_weight_but_has_no_values() -> None:
    layer = SpectralLinear(6, 4, 2, dtype=torch.float64, device="meta")
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == (
        (4, 6),
        torch.float64,
        "meta",
    )
    assert "shape=(4, 6)" in repr(weight)
    for use in (
        lambda: weight + 1,
        lambda: weight.to(torch.float32),
        lambda: nn.functional.linear(torch.ones(1, 6, dtype=torch.float64), weight),
    ):
        with pytest.raises(SpectralError, match=r"effective_weight\(\)"):
            use()


def test_experts_that_stay_dense_are_named_with_their_share(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = mixtral()
    with caplog.at_level(logging.INFO, "spectral_scale"):
        converted = convert(model, SpectralConfig(spectral_rank=4))
    dense = dense_block_weights(model, converted)
    assert "model.layers.*.mlp.experts.gate_up_proj" in dense
    taken = sum(layer.in_features * layer.out_features for layer in converted.values())
    share = sum(dense.values()) / (sum(dense.values()) + taken)
    (record,) = [r for r in caplog.records if "stay dense" in r.message]
    assert record.levelno == logging.WARNING
    assert f"{100 * share:.0f} % of the blocks' matrix weights" in record.message
    assert "mlp.experts.gate_up_proj" in record.message


def test_a_model_of_linears_alone_leaves_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    config = hf.OPTConfig(**SMALL, ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32)
    with caplog.at_level(logging.INFO, "spectral_scale"):
        convert(hf.OPTForCausalLM(config), SpectralConfig(spectral_rank=4))
    assert not [r for r in caplog.records if "stay dense" in r.message]


def test_matrices_of_other_modules_are_named_where_there_is_no_linear() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)])})
    with pytest.raises(ConfigError, match=r"h\.\*\.weight"):
        convert(model, SpectralConfig(spectral_rank=4))


def test_conv1d_is_converted_and_is_itself_again_when_merged() -> None:
    """GPT-2's linears, whose weight is stored as (in, out): the state dict is what it was."""
    model = MODELS["GPT-2"]()
    assert isinstance(model, hf.GPT2LMHeadModel)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = convert(model, SpectralConfig(spectral_rank=4))
    assert len(layers) == 8
    fused = layers["transformer.h.0.attn.c_attn"]
    assert (fused.out_features, fused.in_features) == (96, 32)
    SpectralController(model, None, SpectralConfig(spectral_rank=4), seed=0)
    merge(model)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
