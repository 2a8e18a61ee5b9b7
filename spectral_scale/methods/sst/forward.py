"""The one place where an SST layer's product is chosen; every form of the layer computes here.

On the CPU and with fixed directions that is `SpectralProduct`, on GPUs `FusedSpectralProduct`.
Other forms of the update take their place beside these two; those of the frozen rest (int8) are
multiplied in `methods.frozen_weight`.
"""

import torch
from torch import Tensor

from spectral_scale.methods.layer import in_product_dtype
from spectral_scale.methods.sst.casts import CastCache, Factors
from spectral_scale.methods.sst.fused_product import FusedSpectralProduct
from spectral_scale.methods.sst.product import Bottleneck, SpectralProduct
from spectral_scale.methods.sst.shared_input import InputMember
from spectral_scale.ops.autocast import product_dtype

FUSED_ON = {"cuda"}
"""Devices on which bytes and launches cost more than products."""


def spectral_forward(
    x: Tensor,
    factors: Factors,
    *,
    enhanced: bool,
    active_sigma_only: bool,
    bottleneck: Bottleneck | None = None,
    casts: CastCache | None = None,
    member: InputMember | None = None,
) -> Tensor:
    """(..., in) -> (..., out), in autocast's dtype where autocast is on, else in x's.

    Args:
        x: input, cast here if that is needed.
        factors: of the layer; gradients go to u, v, sigma and bias.
        enhanced: the form of the gradient; see `SpectralProduct`.
        active_sigma_only: sigmas of fixed directions get no gradient.
        bottleneck: completes partial sums over tensor-parallel ranks.
        casts: keeps cast factors between micro-batches; None casts them in every pass.
        member: of layers that cast a common input once; None casts it for this layer alone.
    """
    if x.device.type in FUSED_ON and factors.residual is not None and factors.u_fixed is None:
        dtype = product_dtype(x)
        compiling = torch.compiler.is_compiling()  # which fuses the casts itself
        kept = None if casts is None or compiling else casts.get(factors, dtype)
        shared = kept is not None and bottleneck is None and x.dtype != dtype
        joint = member.take(x, dtype) if member is not None and shared else None
        y: Tensor = FusedSpectralProduct.apply(
            x.reshape(-1, x.shape[-1]), factors.residual, factors.u, factors.v, factors.sigma,
            factors.bias, dtype, enhanced, bottleneck, kept, factors.residual_scale, joint,
        )  # fmt: skip
    else:
        x = in_product_dtype(x)
        y = SpectralProduct.apply(
            x.reshape(-1, x.shape[-1]), factors.residual, factors.u, factors.v, factors.u_fixed,
            factors.v_fixed, factors.sigma, factors.bias, enhanced, active_sigma_only, bottleneck,
            factors.residual_scale,
        )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])
