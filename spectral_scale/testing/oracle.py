"""The product of an SST layer in the plainest words: the oracle of `methods.sst.product`.

Shape suffixes: T tokens, O out_features, I in_features, R trained triplets, F fixed triplets.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class PlainSpectralProduct(torch.autograd.Function):
    """y = x W_res^T + ((x v) sigma_R) u^T + ((x v_fixed) sigma_F) u_fixed^T + bias.

    Gradients, with z = x v and h = (dL/dy) u: `enhanced` gives dL/du = g^T z, dL/dv = x^T h (the
    singular value left out, so that a small one does not slow its direction); otherwise the true
    partials, each column times its sigma. dL/dsigma = sum over tokens of h z. No dense
    weight gradient is ever formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        residual_OI: Tensor | None,
        u_OR: Tensor,
        v_IR: Tensor,
        u_OF: Tensor | None,
        v_IF: Tensor | None,
        sigma: Tensor,
        bias_O: Tensor | None,
        enhanced: bool,
        active_sigma_only: bool,
    ) -> Tensor:
        """All of x's dtype, except u, v, sigma and bias, which are cast to it."""
        dtype = x_TI.dtype
        r = u_OR.shape[1]
        u, v, s = u_OR.to(dtype), v_IR.to(dtype), sigma.to(dtype)
        z = x_TI @ v
        y = _affine(x_TI, residual_OI, bias_O, u)
        y.addmm_(z * s[:r], u.t())
        z_fixed = None
        if u_OF is not None and v_IF is not None:
            z_fixed = x_TI @ v_IF
            y.addmm_(z_fixed * s[r:], u_OF.t())
        ctx.save_for_backward(x_TI, residual_OI, u, v, u_OF, v_IF, s, z, z_fixed)
        ctx.enhanced, ctx.active_sigma_only = enhanced, active_sigma_only
        ctx.dtypes = u_OR.dtype, v_IR.dtype, sigma.dtype, None if bias_O is None else bias_O.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, u, v, sigma and bias."""
        g = grads[0]
        x, residual, u, v, u_fixed, v_fixed, s, z, z_fixed = ctx.saved_tensors
        u_dtype, v_dtype, sigma_dtype, bias_dtype = ctx.dtypes
        r = u.shape[1]
        h = g @ u
        d_u, d_v = g.t() @ z, x.t() @ h
        if not ctx.enhanced:
            d_u, d_v = d_u * s[:r], d_v * s[:r]
        d_sigma = _sum_of_products(h, z, sigma_dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (h * s[:r]) @ v.t() if residual is None else g @ residual
            if residual is not None:
                d_x.addmm_(h * s[:r], v.t())
        if u_fixed is not None:
            h_fixed = g @ u_fixed
            if d_x is not None:
                d_x.addmm_(h_fixed * s[r:], v_fixed.t())
            d_fixed = (
                torch.zeros_like(s[r:], dtype=sigma_dtype)
                if ctx.active_sigma_only
                else _sum_of_products(h_fixed, z_fixed, sigma_dtype)
            )
            d_sigma = torch.cat([d_sigma, d_fixed])
        d_bias = None if bias_dtype is None else g.sum(0, dtype=bias_dtype)
        return (
            d_x, None, d_u.to(u_dtype), d_v.to(v_dtype), None, None, d_sigma, d_bias, None, None
        )  # fmt: skip


def _affine(x_TI: Tensor, residual: Tensor | None, bias: Tensor | None, u: Tensor) -> Tensor:
    """x W_res^T + bias, or a fresh (T, O) tensor of bias or zeros without a residual."""
    if residual is not None and bias is not None:
        return torch.addmm(bias.to(x_TI.dtype), x_TI, residual.t())
    if residual is not None:
        return x_TI @ residual.t()
    y = x_TI.new_zeros(x_TI.shape[0], u.shape[0])
    return y if bias is None else y.add_(bias.to(x_TI.dtype))


def _sum_of_products(h: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over tokens of h z, accumulated in the singular values' dtype."""
    return (h.to(dtype) * z.to(dtype)).sum(0)
