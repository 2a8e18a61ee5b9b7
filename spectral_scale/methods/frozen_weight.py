"""Products with a frozen weight, whole-number or not: the same two calls for every layer.

A frozen weight W (O, I) is a tensor of any floating dtype, which is cast to that of the product, or
int8 with a scale for each of its rows (`ops.int8`). Processors that can multiply such a weight as
it is do so. Other devices widen it for one product: it then saves memory and no time, and inputs
are not rounded.

Shape suffixes: T tokens, O out_features, I in_features.
"""

import torch
from torch import Tensor

from spectral_scale.ops import int8


def multiplies_int8(device: torch.device) -> bool:
    """Whether an int8 weight is multiplied as it is on this device."""
    return device.type == "cpu" and int8.processor_multiplies()


def widened(weight_OI: Tensor, scale_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`; a copy, unless it has that dtype, which is to live for one product."""
    if scale_O is None:
        return weight_OI.to(dtype)
    return int8.dequantise(weight_OI, scale_O, dtype)


def affine(
    x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    """x W^T + bias, in x's dtype."""
    if scale_O is not None and multiplies_int8(x_TI.device):
        return int8.linear(x_TI, weight_OI, scale_O, bias_O)
    weight = widened(weight_OI, scale_O, x_TI.dtype).t()
    return x_TI @ weight if bias_O is None else torch.addmm(bias_O.to(x_TI.dtype), x_TI, weight)


def input_gradient(g_TO: Tensor, weight_OI: Tensor, scale_O: Tensor | None) -> Tensor:
    """g W, in g's dtype."""
    if scale_O is not None and multiplies_int8(g_TO.device):
        return int8.input_gradient(g_TO, weight_OI, scale_O)
    return g_TO @ widened(weight_OI, scale_O, g_TO.dtype)
