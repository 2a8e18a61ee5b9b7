"""The weight of a FRoD layer, its product, and the gradients of its coefficients.

The weight is formed for each pass and freed after it: nothing of its size is kept, and a step costs
the layer's dense products plus about 10 m n^2 FLOPs for each micro-batch, whatever its tokens (16
where products with S are dense).
Gradients of the coefficients come from the dense gradient G = dL/dW: dL/dS_pq = u_p^T G v_q.

Shape suffixes: T tokens, O out_features, I in_features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_scale.methods.frod.sparsity import Pattern
from spectral_scale.ops.token_sums import column_sums


@dataclass(frozen=True, kw_only=True)
class CategoryBasis:
    """The basis of all layers of a category, once on each rank; backends do not shard it."""

    category: str
    """The category's name: the last parts of its layers' names."""
    v: Tensor
    """The common basis V of the category, (n, n)."""
    v_inverse_t: Tensor
    """The inverse of V, transposed, (n, n)."""
    pattern: Pattern
    """The positions of the entries of S."""

    @property
    def nbytes(self) -> int:
        """Bytes of V, V^-T and the positions."""
        return self.v.nbytes + self.v_inverse_t.nbytes + self.pattern.positions.nbytes


@dataclass(frozen=True)
class WeightShard:
    """The shard of a weight on a tensor-parallel rank: some of its rows, or some of its columns.

    A rank with rows of W forms the same rows of U alone. Each entry of U needs all columns of W, so
    ranks that are sharded by columns sum U over ranks, m n elements in each pass. The gradients of
    the coefficients are summed over ranks in both cases.
    """

    columns: slice | None
    """The columns on this rank; None: the weight is sharded by rows."""
    sum: Callable[[Tensor], Tensor]
    """The sum over ranks, as a new tensor."""


def directions(
    base_OI: Tensor, basis: CategoryBasis, inverse_lengths: Tensor, shard: WeightShard | None = None
) -> Tensor:
    """U^T (n, m) = diag(1 / lambda) V^-1 W^T, in V's dtype. Collective if columns are sharded."""
    columns = None if shard is None else shard.columns
    v_inverse_t = basis.v_inverse_t if columns is None else basis.v_inverse_t[columns]
    u = v_inverse_t.t() @ base_OI.to(basis.v.dtype).t()
    if shard is not None and columns is not None:
        u = shard.sum(u)
    return u.mul_(inverse_lengths[:, None])


def adapted_weight(
    base_OI: Tensor,
    u_IO: Tensor,
    basis: CategoryBasis,
    mixing: Tensor,
    value_delta: Tensor,
    shard: WeightShard | None = None,
) -> Tensor:
    """W + U (S + diag(delta)) V^T (m, n), in V's dtype; exactly W if both are zero."""
    inner = basis.pattern.apply(mixing, u_IO)
    inner.addcmul_(u_IO, value_delta.to(u_IO.dtype)[:, None])
    return torch.addmm(base_OI.to(u_IO.dtype), inner.t(), _here(basis.v, shard).t())


def _here(v: Tensor, shard: WeightShard | None) -> Tensor:
    """The rows of V that belong to the weight's columns on this rank."""
    return v if shard is None or shard.columns is None else v[shard.columns]


class FRoDProduct(torch.autograd.Function):
    """y = x (W + U (S + diag(delta)) V^T)^T + bias, with U = W V^-T diag(1 / lambda)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        base_OI: Tensor,
        mixing: Tensor,
        value_delta: Tensor,
        bias_O: Tensor | None,
        basis: CategoryBasis,
        inverse_lengths: Tensor,
        shard: WeightShard | None = None,
    ) -> Tensor:
        """The output in x's dtype; the weight is formed in V's dtype and rounded once.

        A shard of rows gives its rows' outputs, one of columns its inputs' summand of all outputs.
        """
        u = directions(base_OI, basis, inverse_lengths, shard)
        weight = adapted_weight(base_OI, u, basis, mixing, value_delta, shard).to(x_TI.dtype)
        ctx.save_for_backward(x_TI, base_OI, mixing, value_delta)
        ctx.basis, ctx.inverse_lengths, ctx.shard = basis, inverse_lengths, shard
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        bias = None if bias_O is None else bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, S, delta and bias; the weight is formed again."""
        g = grads[0]
        x, base, mixing, value_delta = ctx.saved_tensors
        basis: CategoryBasis = ctx.basis
        shard: WeightShard | None = ctx.shard
        u = directions(base, basis, ctx.inverse_lengths, shard)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = g @ adapted_weight(base, u, basis, mixing, value_delta, shard).to(g.dtype)
        h = _here(basis.v, shard).t() @ (x.t() @ g).to(u.dtype)
        d_mixing, d_delta = basis.pattern.products(u, h), (u * h).sum(1)
        if shard is not None:
            both = shard.sum(torch.cat([d_mixing, d_delta]))
            d_mixing, d_delta = both.split([d_mixing.numel(), d_delta.numel()])
        d_mixing, d_delta = d_mixing.to(mixing.dtype), d_delta.to(value_delta.dtype)
        d_bias = column_sums(g, ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        return d_x, None, d_mixing, d_delta, d_bias, None, None, None
