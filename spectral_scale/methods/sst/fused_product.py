"""The product of an SST layer with a residual, arranged for few launches and few bytes on GPUs.

`testing.oracle.PlainSpectralProduct` says the same in the plainest words and is what this is tested
against. What a GPU waits for is memory: a product of rank 64 moves as many bytes as one of full
rank. So the residual and u stand side by side, P = [W_res | u], in a scratch that lives for one
product:

    y = [x | x v] [W_res | u diag(sigma)]^T + bias
    [dx | h] = g [W_res | u], then dx += h (v diag(sigma))^T

x is cast into the left part of a buffer whose right part takes x v; layers with one input take one
buffer (`shared_input`). Where x needs no cast, copying it there would cost more than a second
product does, and two products are taken. The gradient of sigma_j is u_j . dL/du_j: no sum over
tokens is needed.

Shape suffixes: T tokens, O out_features, I in_features, R trained triplets.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_scale.methods.frozen_weight import widened
from spectral_scale.methods.sst.casts import CastFactors, cast_factors
from spectral_scale.methods.sst.product import Bottleneck
from spectral_scale.methods.sst.shared_input import JointInput


class FusedSpectralProduct(torch.autograd.Function):
    """y = x W_res^T + ((x v) sigma) u^T + bias, with the gradients of `SpectralProduct`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        residual_OI: Tensor,
        u_OR: Tensor,
        v_IR: Tensor,
        sigma_R: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        enhanced: bool,
        bottleneck: Bottleneck | None = None,
        kept: CastFactors | None = None,
        scale_O: Tensor | None = None,
        joint: JointInput | None = None,
    ) -> Tensor:
        """The output in `dtype`, to which x and every factor is cast.

        `scale_O`: of the rows of a residual of whole numbers (`frozen_weight`). `kept`: the cast
        factors, if they exist already. `joint`: cast x with x v beside it, if it exists already.
        """
        cast = kept or cast_factors(u_OR, v_IR, sigma_R, bias_O, dtype)
        residual = widened(residual_OI, scale_O, dtype)
        width = x_TI.shape[1]
        if joint is not None:
            x, z, wide_OK = joint.buffer_TK, *joint.operands(residual, cast.u_sigma_OR)
            y = _affine(x[:, : wide_OK.shape[1]], wide_OK, cast.bias_O)
        elif x_TI.dtype == dtype:
            z = x_TI @ cast.v_IR
            y = _affine(x_TI, residual, cast.bias_O).addmm_(z, cast.u_sigma_OR.t())
            x = x_TI
        else:
            x = x_TI.new_empty((x_TI.shape[0], width + u_OR.shape[1]), dtype=dtype)
            cast_x, z = x[:, :width], x[:, width:]
            cast_x.copy_(x_TI)
            if torch.compiler.is_compiling():  # which takes no `out` that is a part of a tensor
                z.copy_(cast_x @ cast.v_IR)
            else:
                torch.mm(cast_x, cast.v_IR, out=z)
            y = _affine(x, torch.cat([residual, cast.u_sigma_OR], 1), cast.bias_O)
        ctx.save_for_backward(
            x, z if joint or x is x_TI else None, residual_OI, scale_O, u_OR, v_IR, sigma_R,
            cast.u_OR, cast.v_sigma_IR,
        )  # fmt: skip
        ctx.enhanced, ctx.bottleneck, ctx.x_dtype = enhanced, bottleneck, x_TI.dtype
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, u, v, sigma and bias."""
        g = grads[0]
        x, z, residual, scale, u, v, sigma, cast_u, cast_v_sigma = ctx.saved_tensors
        width = residual.shape[1]
        x, z = x[:, :width], x[:, width:] if z is None else z
        shared = None if ctx.bottleneck is None else ctx.bottleneck.sharding
        if ctx.bottleneck is None:
            d_x, h = _input_gradient(
                g, widened(residual, scale, g.dtype), cast_u, cast_v_sigma,
                wanted=ctx.needs_input_grad[0], in_one=ctx.x_dtype != g.dtype,
            )  # fmt: skip
        else:
            d_x, h = None, g @ cast_u
            # Of z here, not in forward: evaluation needs no sum.
            finish = ctx.bottleneck.start_sum(h if shared == "column_parallel" else z)
            if ctx.needs_input_grad[0]:
                d_x = (g @ widened(residual, scale, g.dtype)).addmm_(h, cast_v_sigma.t())
            h, z = (finish(), z) if shared == "column_parallel" else (h, finish())
        d_u, d_v = _product(g.t(), z, u.dtype), _product(x.t(), h, v.dtype)
        # Of the factor that every rank holds whole, whose gradient is complete.
        d_sigma = _dots(v, d_v) if shared == "column_parallel" else _dots(u, d_u)
        if not ctx.enhanced:
            d_u, d_v = d_u.mul_(sigma), d_v.mul_(sigma)
        d_bias = None if ctx.bias_dtype is None else g.sum(0, dtype=ctx.bias_dtype)
        if d_x is not None:
            d_x = d_x.to(ctx.x_dtype)
        settings = (None,) * 6  # dtype, enhanced, bottleneck, kept, scale, joint
        return d_x, None, d_u, d_v, d_sigma.to(sigma.dtype), d_bias, *settings


def _affine(a_TK: Tensor, b_OK: Tensor, bias_O: Tensor | None) -> Tensor:
    """a b^T + bias."""
    return a_TK @ b_OK.t() if bias_O is None else torch.addmm(bias_O, a_TK, b_OK.t())


def _input_gradient(
    g_TO: Tensor,
    residual_OI: Tensor,
    u_OR: Tensor,
    v_sigma_IR: Tensor,
    *,
    wanted: bool,
    in_one: bool,
) -> tuple[Tensor | None, Tensor]:
    """dL/dx, if it is wanted, and h = g u. In one product, dL/dx is a part of a wider tensor."""
    if not wanted:
        return None, g_TO @ u_OR
    if in_one:
        both = g_TO @ torch.cat([residual_OI, u_OR], 1)
        d_x, h = both[:, : residual_OI.shape[1]], both[:, residual_OI.shape[1] :]
    else:
        d_x, h = g_TO @ residual_OI, g_TO @ u_OR
    return d_x.addmm_(h, v_sigma_IR.t()), h


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`; on a GPU, sums over tokens are kept in it and never rounded between."""
    if a.dtype == dtype or not a.is_cuda:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def _dots(a_KR: Tensor, b_KR: Tensor) -> Tensor:
    """The dot product of each column of a with that of b (R,), in one launch without a copy.

    `out` keeps it out of autocast, in which a backward pass may run.
    """
    rows = a_KR.to(b_KR.dtype).unsqueeze(2).permute(1, 2, 0)
    columns = b_KR.unsqueeze(2).permute(1, 0, 2)
    if torch.compiler.is_compiling():
        return torch.bmm(rows, columns).flatten()
    return torch.bmm(rows, columns, out=b_KR.new_empty((b_KR.shape[1], 1, 1))).flatten()
