"""The product of an SST layer and its gradients, arranged for speed.

`testing.oracle.PlainSpectralProduct` says the same in the plainest words and is what this is tested
against. What differs was measured (docs/benchmarks.md): products accumulate into existing outputs,
token sums of wide tensors go by blocks that stay in the processor's cache, and the fixed
directions' temporaries are scaled in place.

Shape suffixes: T tokens, O out_features, I in_features, R trained triplets, F fixed triplets.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_scale.methods import frozen_weight
from spectral_scale.methods.tensor_parallel_context import Sharding, StartSum
from spectral_scale.ops.token_sums import column_sums, sum_of_products


@dataclass(frozen=True)
class Bottleneck:
    """Completes, over tensor-parallel ranks, what one rank's shard of a layer leaves partial.

    In a column-parallel layer ranks hold rows of u: h is partial, and must be complete in dL/dv and
    dL/dsigma, but partial in dL/dx, which is summed later. In a row-parallel one they hold rows of
    v: z is partial, and must be complete in dL/du and dL/dsigma, but partial in y. One sum of
    (T, R) then makes the gradients of the factors that every rank holds whole complete and equal.
    """

    sharding: Sharding
    """The sharding: by outputs (column_parallel) or by inputs (row_parallel) of the layer."""
    start_sum: StartSum
    """Starts a sum over ranks, which travels while the widest product is computed."""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor."""
        return self.start_sum(partial)()


class SpectralProduct(torch.autograd.Function):
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
        bottleneck: Bottleneck | None = None,
        scale_O: Tensor | None = None,
    ) -> Tensor:
        """The output in x's dtype, to which every other argument is cast.

        `scale_O`: of the rows of a residual of whole numbers (`frozen_weight`).

        Frozen weights are kept for backward as they are and cast again there: a cast copy would
        live as long as the activations.
        """
        dtype = x_TI.dtype
        r = u_OR.shape[1]
        u, v, s = u_OR.to(dtype), v_IR.to(dtype), sigma.to(dtype)
        z = x_TI @ v
        if residual_OI is not None:
            y = frozen_weight.affine(x_TI, residual_OI, scale_O, bias_O)
            y.addmm_(z * s[:r], u.t())
        else:
            y = _affine(z * s[:r], u.t(), bias_O)
        z_fixed = None
        if u_OF is not None and v_IF is not None:
            z_fixed = x_TI @ v_IF.to(dtype)
            y.addmm_(z_fixed * s[r:], u_OF.to(dtype).t())
        z_kept = None if active_sigma_only else z_fixed
        ctx.save_for_backward(x_TI, residual_OI, scale_O, u, v, u_OF, v_IF, s, z, z_kept)
        ctx.enhanced, ctx.bottleneck = enhanced, bottleneck
        ctx.dtypes = u_OR.dtype, v_IR.dtype, sigma.dtype, None if bias_O is None else bias_O.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, u, v, sigma and bias."""
        g = grads[0]
        x, residual, scale, u, v, u_fixed, v_fixed, s, z, z_fixed = ctx.saved_tensors
        u_dtype, v_dtype, sigma_dtype, bias_dtype = ctx.dtypes
        r = u.shape[1]
        h = g @ u
        complete, finish = h, None
        by_columns = ctx.bottleneck is not None and ctx.bottleneck.sharding == "column_parallel"
        if ctx.bottleneck is not None:  # of z here, not in forward: evaluation needs no sum
            finish = ctx.bottleneck.start_sum(h if by_columns else z)
        rest = None
        if ctx.needs_input_grad[0] and residual is not None:
            rest = frozen_weight.input_gradient(g, residual, scale)
        if finish is not None and by_columns:
            complete = finish()
        elif finish is not None:
            z = finish()
        d_u, d_v = g.t() @ z, x.t() @ complete
        if not ctx.enhanced:
            d_u, d_v = d_u.mul_(s[:r]), d_v.mul_(s[:r])
        d_sigma = sum_of_products(complete, z, sigma_dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            h.mul_(s[:r])
            d_x = h @ v.t() if rest is None else rest.addmm_(h, v.t())
        if u_fixed is not None:
            d_fixed, d_x = _backward_fixed(ctx, g, d_x, u_fixed, v_fixed, s[r:], z_fixed)
            if ctx.bottleneck is not None and z_fixed is not None:
                d_fixed = ctx.bottleneck.sum(d_fixed)
            d_sigma = torch.cat([d_sigma, d_fixed])
        d_bias = None if bias_dtype is None else column_sums(g, bias_dtype)
        settings = (None, None, None, None)  # enhanced, active_sigma_only, bottleneck, scale
        return (
            d_x, None, d_u.to(u_dtype), d_v.to(v_dtype), None, None, d_sigma, d_bias, *settings
        )  # fmt: skip


def _affine(a_TK: Tensor, b_KO: Tensor, bias_O: Tensor | None) -> Tensor:
    """a b + bias, in a's dtype."""
    return a_TK @ b_KO if bias_O is None else torch.addmm(bias_O.to(a_TK.dtype), a_TK, b_KO)


def _backward_fixed(
    ctx: Any,
    g_TO: Tensor,
    d_x_TI: Tensor | None,
    u_OF: Tensor,
    v_IF: Tensor,
    s_F: Tensor,
    z_TF: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The fixed directions' gradient of sigma (zero without z), and d_x with theirs added."""
    d_sigma = torch.zeros_like(s_F, dtype=ctx.dtypes[2])
    if d_x_TI is None and z_TF is None:
        return d_sigma, None
    h = g_TO @ u_OF.to(g_TO.dtype)
    if z_TF is not None:
        d_sigma = sum_of_products(h, z_TF, d_sigma.dtype)
    if d_x_TI is not None:
        d_x_TI.addmm_(h.mul_(s_F), v_IF.to(h.dtype).t())
    return d_sigma, d_x_TI
