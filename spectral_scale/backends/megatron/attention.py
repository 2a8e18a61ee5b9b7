"""Causal attention by torch's fused kernels, in the place of megatron-core's plain products.

megatron-core's own without Transformer Engine keeps the scores of all pairs of tokens for the
backward pass, sequence squared for each head.
"""

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spectral_scale.errors import SpectralError


class FusedAttention(DotProductAttention):
    """A core attention for layer specs: causal, without dropout, masks or biases of attention.

    Arguments are the base's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Query [s, b, heads, head], key and value [s, b, groups, head] of this rank -> [s, b,
        heads x head]. Raises SpectralError for what it leaves out."""
        if any(x is not None for x in (attention_mask, attention_bias, packed_seq_params)):
            raise SpectralError(
                "fused attention is causal over whole sequences and takes no mask, bias or packing"
            )
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] > k.shape[1]
        )
        return context.permute(2, 0, 1, 3).flatten(2)
