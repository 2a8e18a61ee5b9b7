"""Sums over tokens, taken block by block so that each block stays in the processor's cache.

Shape suffixes: T tokens, O out_features, R trained triplets.
"""

import torch
from torch import Tensor

BLOCK_ROWS = 128
"""Tokens that a sum over tokens takes at a time on the CPU."""


def sum_of_products(h_TR: Tensor, z_TR: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over tokens of h z (R,), computed in `dtype`."""
    total = torch.zeros(h_TR.shape[1], dtype=dtype, device=h_TR.device)
    for h, z in zip(_blocks(h_TR), _blocks(z_TR), strict=True):
        total += (h.to(dtype) * z.to(dtype)).sum(0)
    return total


def column_sums(g_TO: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over tokens of g (O,), computed in `dtype`."""
    total = torch.zeros(g_TO.shape[1], dtype=dtype, device=g_TO.device)
    for g in _blocks(g_TO):
        total += g.sum(0, dtype=dtype)
    return total


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Blocks of rows. A GPU casts within the reduction's one kernel and gains nothing from them."""
    rows = BLOCK_ROWS if tensor.device.type == "cpu" else max(1, tensor.shape[0])
    return tensor.split(rows)
