"""The product of a layer in the tangent form, unmerged or with the formed weight; its gradients.

Shape suffixes: T tokens, O out_features, I in_features, R trained vectors a side, B = 2 R.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_scale.config.methods.tangent import forms_weight
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext
from spectral_scale.ops.token_sums import column_sums


class TangentProduct(torch.autograd.Function):
    """y = x base^T + (x c) u0^T + (x v0) d^T + bias.

    With z = x v0 and h = (dL/dy) u0: dL/dc = x^T h, dL/dd = (dL/dy)^T z. The other frozen tensors
    have no gradient, and no gradient of the size of the weight is ever formed. Over tensor-parallel
    ranks `context` completes h (column-parallel) or z (row-parallel), of which a shard has a part.

    Where that takes fewer multiplications (`forms_weight`), base + u0 c^T + d v0^T is formed in the
    forward pass and once more in the backward pass, and freed after each. Elsewhere the four thin
    factors lie side by side and make two products of width 2 R:

        y += (x [c, v0]) [u0, d]^T          dL/dx = g base + (g [u0, d]) [c, v0]^T
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        base_OI: Tensor,
        c_IR: Tensor,
        d_OR: Tensor,
        u0_OR: Tensor,
        v0_IR: Tensor,
        bias_O: Tensor | None,
        context: TensorParallelContext | None = None,
    ) -> Tensor:
        """The output in x's dtype, to which every other argument is cast.

        Factors are kept for backward as they are and put together again there: what is made of them
        would live as long as the activations.
        """
        dtype = x_TI.dtype
        factors = (c_IR, d_OR, u0_OR, v0_IR)
        ctx.formed = forms_weight(len(x_TI), (len(base_OI), x_TI.shape[1]), dtype.itemsize)
        ctx.context, ctx.bias_dtype = context, None if bias_O is None else bias_O.dtype
        if ctx.formed:
            ctx.save_for_backward(x_TI, base_OI, *factors, None)
            return _affine(x_TI, _formed(base_OI, *factors, dtype), bias_O)
        p_TB = x_TI @ _side_by_side(c_IR, v0_IR, dtype)
        y = _affine(x_TI, base_OI.to(dtype), bias_O)
        y.addmm_(p_TB, _side_by_side(u0_OR, d_OR, dtype).t())
        ctx.save_for_backward(x_TI, base_OI, *factors, p_TB[:, c_IR.shape[1] :].contiguous())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, c, d and bias."""
        g = grads[0]
        x, base, c, d, u0, v0, z = ctx.saved_tensors
        d_x = h = None
        if ctx.needs_input_grad[0] and ctx.formed:
            d_x = g @ _formed(base, c, d, u0, v0, g.dtype)
        elif ctx.needs_input_grad[0]:
            q_TB = g @ _side_by_side(u0, d, g.dtype)
            d_x = (g @ base.to(g.dtype)).addmm_(q_TB, _side_by_side(c, v0, g.dtype).t())
            h = q_TB[:, : c.shape[1]]
        h = g @ u0.to(g.dtype) if h is None else h
        z = x @ v0.to(x.dtype) if z is None else z
        if ctx.context is not None and ctx.context.column_parallel:
            h = ctx.context.sum(h.contiguous())  # complete in dL/dc, partial in dL/dx
        elif ctx.context is not None:
            z = ctx.context.sum(z)
        d_c, d_d = x.t() @ h, g.t() @ z
        d_bias = None if ctx.bias_dtype is None else column_sums(g, ctx.bias_dtype)
        return d_x, None, d_c.to(c.dtype), d_d.to(d.dtype), None, None, d_bias, None


def _affine(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x weight^T + bias, in x's dtype."""
    return torch.nn.functional.linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(x_TI))


def _side_by_side(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([first.to(dtype), second.to(dtype)], dim=1)


def _formed(
    base: Tensor, c: Tensor, d: Tensor, u0: Tensor, v0: Tensor, dtype: torch.dtype
) -> Tensor:
    """The weight that the layer stands for (O, I), in `dtype`."""
    left, right = _side_by_side(u0, d, dtype), _side_by_side(c, v0, dtype)
    return torch.addmm(base.to(dtype), left, right.t())
