"""The Sparse Spectral Training linear layer (arXiv 2405.15481) and its gradients.

Shape suffixes: T tokens, O out_features, I in_features, R trained triplets, F fixed triplets.
Knows nothing of schedules, banks, optimizers or processes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spectral_scale.errors import SpectralError
from spectral_scale.layers.base import FactoredLinear
from spectral_scale.parallel.table import Role


class SpectralProduct(torch.autograd.Function):
    """y = x W_res^T + ((x v) sigma_R) u^T + ((x v_fixed) sigma_F) u_fixed^T + bias.

    Gradients, with z = x v and h = (dL/dy) u: `enhanced` gives dL/du = g^T z, dL/dv = x^T h (the
    singular value left out, methods section "SST"); otherwise the true partials, each column times
    its sigma. dL/dsigma = sum over tokens of h z. No dense weight gradient is ever formed.
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


class SpectralLinear(FactoredLinear):
    """A linear layer of which r singular triplets train at a time.

    Parameters (all of fixed shape for the whole run):
        u (out, r), v (in, r): trained directions, unit columns.
        sigma (r,), or (k,) in factored storage: singular values, those of u and v first.
        bias (out,): as the dense layer's, if it has one.
        residual (out, in), frozen: everything not trained (residual storage).
        u_fixed (out, k - r), v_fixed (in, k - r), frozen: the other directions (factored storage).
    """

    parameter_roles: ClassVar[dict[str, Role]] = {
        "u": "direction",
        "v": "direction",
        "sigma": "value",
        "residual": "residual",
        "u_fixed": "fixed",
        "v_fixed": "fixed",
    }
    residual: nn.Parameter | None
    u_fixed: nn.Parameter | None
    v_fixed: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spectral_rank: int,
        *,
        storage: str = "residual",
        enhanced: bool = True,
        active_sigma_only: bool = False,
        bias: bool = True,
        frozen_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.spectral_rank = spectral_rank
        self.enhanced, self.active_sigma_only = enhanced, active_sigma_only
        k = min(in_features, out_features)

        def trained(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        def frozen(*shape: int) -> nn.Parameter:
            zeros = torch.zeros(shape, device=device, dtype=frozen_dtype or dtype)
            return nn.Parameter(zeros, requires_grad=False)

        self.u = trained(out_features, spectral_rank)
        self.v = trained(in_features, spectral_rank)
        self.sigma = trained(spectral_rank if storage == "residual" else k)
        self.bias = trained(out_features) if bias else None
        in_residual = storage == "residual"
        self.residual = frozen(out_features, in_features) if in_residual else None
        self.u_fixed = None if in_residual else frozen(out_features, k - spectral_rank)
        self.v_fixed = None if in_residual else frozen(in_features, k - spectral_rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's dtype where autocast is on, else in x's."""
        if not self.ready:
            raise SpectralError(
                "a converted layer was used before its triplets were installed; "
                "create the SpectralController after convert() and before the first forward"
            )
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        y = SpectralProduct.apply(
            x.reshape(-1, self.in_features),
            self.residual,
            self.u,
            self.v,
            self.u_fixed,
            self.v_fixed,
            self.sigma,
            self.bias,
            self.enhanced,
            self.active_sigma_only,
        )
        return y.view(*x.shape[:-1], self.out_features)

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the factors the optimizer sees, whatever a host did to the storage."""
        r = self.spectral_rank
        sigma = r if self.residual is not None else min(self.in_features, self.out_features)
        return {"u": (self.out_features, r), "v": (self.in_features, r), "sigma": (sigma,)}

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The dense weight (out, in) this layer stands for, in u's dtype."""
        r = self.spectral_rank
        weight = (self.u * self.sigma[:r]) @ self.v.t()
        if self.residual is not None:
            weight += self.residual
        if self.u_fixed is not None and self.v_fixed is not None:
            dtype = weight.dtype
            weight += (self.u_fixed.to(dtype) * self.sigma[r:]) @ self.v_fixed.t().to(dtype)
        return weight

    def extra_repr(self) -> str:
        """Shapes and storage, as nn.Linear prints its own."""
        storage = "residual" if self.residual is not None else "factored"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"spectral_rank={self.spectral_rank}, storage={storage}, bias={self.bias is not None}"
        )
