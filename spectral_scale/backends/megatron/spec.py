"""Layer specs that put spectral layers into a megatron-core GPTModel."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from spectral_scale.backends.megatron.attention import FusedAttention
from spectral_scale.backends.megatron.layers import (
    SpectralColumnParallelLinear,
    SpectralRowParallelLinear,
    bound,
)
from spectral_scale.backends.megatron.matrix import Completion, MatrixSettings
from spectral_scale.backends.megatron.norm import SequenceParallelNorm
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError

_NOT_ONE = (
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
_NOT_SET = (
    "virtual_pipeline_model_parallel_size",
    "num_moe_experts",
    "fp8",
    "fp4",
    "multi_latent_attention",
    "attention_output_gate",
    "tp_comm_overlap",
    "defer_embedding_wgrad_compute",
    "delay_wgrad_compute",
    "cpu_offloading",
    "gradient_accumulation_fusion",
    "fp16",
    "qk_clip",
)


def spectral_gpt_layer_spec(
    config: Any,
    spectral: SpectralConfig,
    *,
    completion: Completion = "bottleneck",
    frozen_dtype: torch.dtype | None = None,
    fused_attention: bool = False,
) -> ModuleSpec:
    """The spec of a transformer layer whose four linears are spectral, for `GPTModel`.

    Query, key and value are matrices of their own, so are gate and up projection. Its norms work
    under sequence parallelism; the model's last norm is part of `spectral_gpt_block_spec`.

    Args:
        config: the model's TransformerConfig.
        spectral: the method's settings (method sst).
        completion: when gradients of whole factors are summed over ranks; see `MatrixSettings`.
        frozen_dtype: of frozen weights; None: `config.params_dtype`.
        fused_attention: torch's kernels in the place of megatron-core's products; see
            `FusedAttention`.

    Raises:
        ConfigError: naming every option of `config` that is not supported, and what to do.
    """
    problems = list(unsupported(config))
    if problems:
        raise ConfigError("the model cannot hold spectral layers:\n  - " + "\n  - ".join(problems))
    settings = MatrixSettings(spectral=spectral, completion=completion, frozen_dtype=frozen_dtype)
    spec = get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelNorm
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    column, row = SpectralColumnParallelLinear, SpectralRowParallelLinear
    if fused_attention:
        attention.core_attention = FusedAttention
    attention.linear_qkv = bound(column, settings, "qkv")
    attention.linear_proj = bound(row, settings)
    mlp.linear_fc1 = bound(column, settings, "gated" if config.gated_linear_unit else "none")
    mlp.linear_fc2 = bound(row, settings)
    return spec


def spectral_gpt_block_spec(config: Any, spectral: SpectralConfig, **options: Any) -> Any:
    """All layers and the last norm; GPTModel takes it as `transformer_layer_spec`.

    Sequence parallelism needs this one: the last norm of the local spec refuses it. Arguments and
    errors are those of `spectral_gpt_layer_spec`.
    """
    layer = spectral_gpt_layer_spec(config, spectral, **options)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.num_layers, layer_norm=SequenceParallelNorm
    )


def unsupported(config: Any) -> Iterator[str]:
    """Options of a TransformerConfig that spectral layers do not support, and what to do."""
    for option in _NOT_ONE:
        value = getattr(config, option, 1)
        if value != 1:
            yield f"{option}={value}: only 1 is supported; use tensor and data parallelism"
    for option in _NOT_SET:
        value = getattr(config, option, None)
        if value:
            yield f"{option}={value} is not supported; leave it out"
    if config.params_dtype not in (torch.float32, torch.float64):
        yield (
            f"params_dtype={config.params_dtype}: triplets train in float32; set float32, or for "
            "bf16 products train with parallel.backend=megatron and train.precision=bf16"
        )
