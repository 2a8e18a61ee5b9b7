"""How training calls transformers' models: whole causal sequences, nothing padded, no cache.

transformers finds out in every forward pass whether there is padding or packing. On a GPU that
costs a wait for the device (LLaMA), or a cumulative sum of floats that has no deterministic form
(OPT). A run knows the answer, so both are left out; logits are the same to the bit.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spectral_scale.config.schema import ModelConfig
from spectral_scale.errors import SpectralError

EAGER_TOKENS = 512
"""Longest sequence for which a CPU computes bf16 attention by plain products."""
CAUSAL_SDPA = "spectral_scale_causal_sdpa"
"""transformers' name of torch's fused attention where no mask is to be made: for a name without a
mask of its own it makes none, and torch is told that attention is causal."""

AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


def choose_attention(
    model: PreTrainedModel, config: ModelConfig, *, device: torch.device, precision: str
) -> str:
    """Set the implementation of attention, in place; returns which: `sdpa` or `eager`.

    The backward pass of torch's fused kernel for CPUs is slow in bf16, the more so the shorter the
    sequences; on other devices, and in fp32, the fused kernels are at least as fast.
    """
    chosen = config.attention
    if chosen == "auto":
        slow = device.type == "cpu" and precision == "bf16"
        chosen = "eager" if slow and config.sequence_length <= EAGER_TOKENS else "sdpa"
    model.set_attn_implementation(CAUSAL_SDPA if chosen == "sdpa" else chosen)
    return chosen


def uses_fused_attention(model: PreTrainedModel) -> bool:
    """Whether attention is torch's fused one."""
    return model.config._attn_implementation in (CAUSAL_SDPA, "sdpa")


def expect_whole_sequences(model: PreTrainedModel) -> None:
    """Have the model number the positions of its input as integers, and refuse a mask that its
    attention would not look at."""
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(_prepare_input, with_kwargs=True)


def _prepare_input(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs.get("attention_mask") is not None:
        if decoder.config._attn_implementation == CAUSAL_SDPA:  # type: ignore[union-attr]
            raise SpectralError(
                "this model was built for training, where sequences are never padded, and would "
                "not look at an attention_mask; leave it out, or call "
                "model.set_attn_implementation('sdpa') first"
            )
        return args, kwargs
    ids = kwargs.get("input_ids")
    fresh = kwargs.get("position_ids") is None and kwargs.get("past_key_values") is None
    if fresh and ids is not None:
        numbers = torch.arange(ids.shape[-1], device=ids.device)
        kwargs["position_ids"] = numbers.expand(ids.shape)
    return args, kwargs
