"""A transformers causal language model on the meta device, and its move to a real one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from spectral_scale.config.families import family_entry
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import ModelConfig
from spectral_scale.models.attention import expect_whole_sequences

Dtype = torch.dtype


def build_model(
    architecture: Architecture, config: ModelConfig, *, eos_token_id: int | None
) -> PreTrainedModel:
    """The model with parameters on the meta device: no memory, no initial values.

    Published special-token ids are not carried over: a padding id would silently freeze the
    embedding row of an ordinary token of another tokenizer.
    """
    family = model_family(architecture)
    hf_config = transformers_config(architecture, config, eos_token_id=eos_token_id)
    hf_config.use_cache = False
    hf_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = family.model(hf_config)
    model.train()
    expect_whole_sequences(model)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def transformers_config(
    architecture: Architecture, config: ModelConfig, *, eos_token_id: int | None
) -> PreTrainedConfig:
    """The transformers configuration of a preset or a folder, with the run's dropout.

    Raises ConfigError for an unknown family.
    """
    return model_family(architecture).config(architecture, config, eos_token_id)


def materialise(model: PreTrainedModel, *, device: torch.device, dtype: Dtype) -> None:
    """Give a meta model memory on `device`, in place: floating parameters in `dtype`, values
    undefined, ties and non-persistent buffers restored.

    Frozen parameters keep a lower precision that conversion gave them.
    """
    set_trained_dtype(model, dtype)
    give_memory(model, device)


def set_trained_dtype(model: nn.Module, dtype: Dtype) -> None:
    """Make the trained parameters of a meta model `dtype`, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def give_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Allocate the parameters of a meta model as they are, whole or sharded, in place; values are
    undefined, ties and non-persistent buffers are restored."""
    tied = tied_names(model)
    model.to_empty(device=device)
    tie(model, tied)
    restore_buffers(model, device)


def restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what a meta model's buffers would hold, on `device`, in place."""
    for name, module in model.named_modules():
        if "RotaryEmbedding" in type(module).__name__:
            parent, _, child = name.rpartition(".")
            fresh = type(module)(config=model.config).to(device)
            setattr(model.get_submodule(parent), child, fresh)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further name of a shared parameter -> its first one."""
    first: dict[int, str] = {}
    tied = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), fqn) != fqn:
            tied[fqn] = first[id(parameter)]
    return tied


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let each name share the parameter of its first one again, in place; see `tied_names`."""
    for fqn, first in tied.items():
        owner, _, leaf = fqn.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))


def compile_blocks(model: PreTrainedModel) -> None:
    """torch.compile each transformer block in place (one compilation serves all of them).

    What is compiled is `forward` alone: the hooks by which FSDP2 and ZeRO-3 gather a block's
    weights run around it, and need not be traced.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.forward = torch.compile(block.forward)


def _opt_config(
    architecture: Architecture, config: ModelConfig, eos_token_id: int | None
) -> OPTConfig:
    if config.path is not None:
        found = OPTConfig.from_json_file(str(Path(config.path) / "config.json"))
        found.dropout = config.dropout
        found.attention_dropout = found.layerdrop = 0.0  # the settings alone decide on randomness
        return found
    return OPTConfig(
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        ffn_dim=architecture.ffn_size,
        vocab_size=architecture.vocab_size,
        max_position_embeddings=architecture.max_positions,
        word_embed_proj_dim=architecture.embedding_size,
        do_layer_norm_before=architecture.pre_norm,
        tie_word_embeddings=architecture.tied_embeddings,
        dropout=config.dropout,
        attention_dropout=0.0,
        pad_token_id=None,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )


def _llama_config(
    architecture: Architecture, config: ModelConfig, eos_token_id: int | None
) -> LlamaConfig:
    if config.path is not None:
        kept = LlamaConfig.from_json_file(str(Path(config.path) / "config.json"))
        kept.attention_dropout = 0.0
        return kept
    return LlamaConfig(
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        intermediate_size=architecture.ffn_size,
        vocab_size=architecture.vocab_size,
        max_position_embeddings=architecture.max_positions,
        tie_word_embeddings=architecture.tied_embeddings,
        pad_token_id=None,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )


@dataclass(frozen=True)
class ModelFamily:
    """How transformers builds the models of a family."""

    model: Callable[..., PreTrainedModel]
    """The transformers class of the family's causal language models."""
    config: Callable[[Architecture, ModelConfig, int | None], PreTrainedConfig]
    """Makes the configuration from the shapes, the run's settings and the end-of-text token."""


MODELS: dict[str, ModelFamily] = {
    "opt": ModelFamily(OPTForCausalLM, _opt_config),
    "llama": ModelFamily(LlamaForCausalLM, _llama_config),
}
"""Family (see `config.families`) -> how its models are built."""


def model_family(architecture: Architecture) -> ModelFamily:
    """How the family of a model is built. Raises ConfigError for an unknown one."""
    return family_entry(MODELS, architecture.family, what="transformers model")
