"""OPT and LLaMA as megatron-core configurations. Plain values: megatron-core is not imported.

Facts of megatron-core are those of 0.16; where its defaults differ from transformers' models, the
setting is written out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from spectral_scale.config.families import family_entry, family_of
from spectral_scale.config.presets import Architecture, architecture_of
from spectral_scale.config.rules_megatron import megatron_problems
from spectral_scale.config.rules_tensor_parallel import tensor_parallel_problems
from spectral_scale.errors import ConfigError

_UNFUSED = dict.fromkeys(
    (
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "gradient_accumulation_fusion",
        "apply_rope_fusion",
    ),
    False,
)


@dataclass(frozen=True, kw_only=True)
class MegatronSettings:
    """A model as megatron-core is told of it."""

    architecture: Architecture
    """Shapes of the model."""
    padded_vocab_size: int
    """Rows of the word embedding, over all ranks together."""
    transformer: dict[str, Any]
    """Keyword arguments of TransformerConfig."""
    gpt: dict[str, Any]
    """Keyword arguments of GPTModel, besides `config` and `transformer_layer_spec`."""


def megatron_settings(
    config: PreTrainedConfig,
    *,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    pad_vocabulary: bool = False,
) -> MegatronSettings:
    """The configuration of the GPTModel that computes what a transformers OPT or LLaMA computes.

    Args:
        config: an OPTConfig or LlamaConfig; its dropouts must be 0.
        tensor_parallel: ranks over which each matrix is sharded.
        sequence_parallel: also shard activations between the blocks' linears, along the sequence.
        dtype: of the parameters.
        device: where megatron-core allocates them.
        pad_vocabulary: add rows until `tensor_parallel` divides the vocabulary; their logits are
            masked, so that no probability goes to them.

    Raises:
        ConfigError: listing every option and size that does not fit, and what to change.
    """
    architecture = megatron_architecture(config)
    padded = architecture.vocab_size
    if pad_vocabulary and tensor_parallel > 0:
        padded += -padded % tensor_parallel
    _require_fit(config, architecture, tensor_parallel, padded)
    family = megatron_family(architecture.family)
    transformer: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": tensor_parallel,
        "sequence_parallel": sequence_parallel and tensor_parallel > 1,
        "use_cpu_initialization": torch.device(device).type == "cpu",
        "perform_initialization": False,  # weights are loaded; see load_weights
        **_UNFUSED,
        **family.transformer(config),
    }
    gpt: dict[str, Any] = {
        "vocab_size": padded,
        "max_sequence_length": position_rows(architecture),
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
        **family.gpt(config),
    }
    return MegatronSettings(
        architecture=architecture, padded_vocab_size=padded, transformer=transformer, gpt=gpt
    )


def megatron_architecture(config: PreTrainedConfig) -> Architecture:
    """Shapes of a transformers configuration. Raises ConfigError for another kind of model."""
    megatron_family(config.model_type)
    return architecture_of(config.to_dict())


def position_rows(architecture: Architecture) -> int:
    """Rows of the position embedding, those that OPT never uses included."""
    return architecture.max_positions + family_of(architecture.family).position_offset


def _require_fit(
    config: PreTrainedConfig, architecture: Architecture, tensor_parallel: int, padded: int
) -> None:
    problems = [*megatron_problems(architecture), *_option_problems(config)]
    for problem in tensor_parallel_problems(architecture, tensor_parallel):
        if "vocabulary" not in problem or padded == architecture.vocab_size:
            problems.append(problem)
    if problems:
        raise ConfigError("the model cannot run on megatron-core:\n  - " + "\n  - ".join(problems))


def _option_problems(config: PreTrainedConfig) -> Iterator[str]:
    for key, required in megatron_family(config.model_type).required.items():
        value = getattr(config, key)
        if value != required:
            yield f"{key}={value!r}: the GPTModel built here has {required!r} only; set it"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        yield (
            f"rope_type={rope['rope_type']!r}: scaled rotary positions are not carried over; set "
            "parallel.backend=fsdp2, or rope_type default"
        )


def _opt_transformer(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "activation_func": F.relu,
        "add_bias_linear": True,
        "gated_linear_unit": False,
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,  # that of torch.nn.LayerNorm, which OPT does not set
    }


def _llama_transformer(config: PreTrainedConfig) -> dict[str, Any]:
    activation: Callable[[Tensor], Tensor] = F.silu
    return {
        "activation_func": activation,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "rotary_interleaved": False,
    }


def _opt_gpt(config: PreTrainedConfig) -> dict[str, Any]:
    return {"position_embedding_type": "learned_absolute"}


def _llama_gpt(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": config.rope_parameters["rope_theta"],
    }


@dataclass(frozen=True, kw_only=True)
class MegatronFamily:
    """How megatron-core is told about the models of a family."""

    required: Mapping[str, Any]
    """Options of the transformers configuration that the GPTModel has in this value only."""
    transformer: Callable[[PreTrainedConfig], dict[str, Any]]
    """Keyword arguments of TransformerConfig that the family decides."""
    gpt: Callable[[PreTrainedConfig], dict[str, Any]]
    """Keyword arguments of GPTModel that the family decides."""


MODELS: dict[str, MegatronFamily] = {
    "opt": MegatronFamily(
        required={
            "activation_function": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
        },
        transformer=_opt_transformer,
        gpt=_opt_gpt,
    ),
    "llama": MegatronFamily(
        required={
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
        },
        transformer=_llama_transformer,
        gpt=_llama_gpt,
    ),
}
"""Family (see `config.families`) -> how megatron-core builds its models."""


def megatron_family(name: str) -> MegatronFamily:
    """How megatron-core is told about a family. Raises ConfigError for an unknown one."""
    return family_entry(MODELS, name, what="Megatron model")
