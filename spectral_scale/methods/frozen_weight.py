"""Products with a frozen weight, whole-number or not: the same two calls for every layer.

A frozen weight W (O, I) is a tensor of any floating dtype, which is cast to that of the product, or
int8 with a scale for each of its rows (`ops.int8`). On the CPU such a weight is multiplied as it
is. Other devices widen it for one product: it then saves memory and no time.

Shape suffixes: T tokens, O out_features, I in_features.
"""

import torch
from torch import Tensor

from spectral_scale.ops import int8

MULTIPLIES_INT8 = {"cpu"}
"""Devices on which an int8 weight is multiplied as it is."""


def widened(weight_OI: Tensor, scale_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`; a copy, unless it has that dtype, which is to live for one product."""
    if scale_O is None:
        return weight_OI.to(dtype)
    return int8.dequantise(weight_OI, scale_O, dtype)


def affine(
    x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    """x W^T + bias, in x's dtype."""
    if scale_O is not None and x_TI.device.type in MULTIPLIES_INT8:
        return int8.linear(x_TI, weight_OI, scale_O, bias_O)
    weight = widened(weight_OI, scale_O, x_TI.dtype).t()
    return x_TI @ weight if bias_O is None else torch.addmm(bias_O.to(x_TI.dtype), x_TI, weight)


def input_gradient(g_TO: Tensor, weight_OI: Tensor, scale_O: Tensor | None) -> Tensor:
    """g W, in g's dtype."""
    if scale_O is not None and g_TO.device.type in MULTIPLIES_INT8:
        return int8.input_gradient(g_TO, weight_OI, scale_O)
    return g_TO @ widened(weight_OI, scale_O, g_TO.dtype)
