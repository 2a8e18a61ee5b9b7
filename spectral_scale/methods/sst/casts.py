"""The factors of an SST layer in the precision of its products, and how long they may be kept.

Shape suffixes: O out_features, I in_features, R trained triplets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What an SST layer multiplies with: the whole layer's, or a tensor-parallel rank's shards."""

    residual: Tensor | None
    """(O, I), frozen."""
    residual_scale: Tensor | None
    """(O,), frozen: of the rows of a residual of whole numbers."""
    u: Tensor
    """(O, R)."""
    v: Tensor
    """(I, R)."""
    u_fixed: Tensor | None
    """(O, F), frozen."""
    v_fixed: Tensor | None
    """(I, F), frozen."""
    sigma: Tensor
    """(R + F,), or (R,) without fixed directions."""
    bias: Tensor | None
    """(O,)."""


@dataclass(frozen=True, kw_only=True)
class CastFactors:
    """Trained factors in the products' dtype; each value is rounded once."""

    u_OR: Tensor
    u_sigma_OR: Tensor
    """u diag(sigma)."""
    v_IR: Tensor
    v_sigma_IR: Tensor
    """v diag(sigma)."""
    bias_O: Tensor | None


def cast_factors(
    u_OR: Tensor, v_IR: Tensor, sigma_R: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> CastFactors:
    """Factors cast to `dtype`, and scaled by sigma before they are."""
    return CastFactors(
        u_OR=u_OR.to(dtype),
        u_sigma_OR=_product(u_OR, sigma_R, dtype),
        v_IR=v_IR.to(dtype),
        v_sigma_IR=_product(v_IR, sigma_R, dtype),
        bias_O=None if bias_O is None else bias_O.to(dtype),
    )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, rounded to `dtype` where it is written; not differentiable."""
    if torch.compiler.is_compiling():
        return (a * b).to(dtype)
    return torch.mul(a, b, out=torch.empty_like(a, dtype=dtype, requires_grad=False))


class CastCache:
    """Keeps a layer's cast factors over the micro-batches of a step.

    They are cast again when a parameter is another tensor or was written to (its version tells),
    and after `clear`, which the layer's controller calls after every step, swap and load: hosts
    that write through `.data` leave versions as they are.
    """

    def __init__(self) -> None:
        self._of: list[tuple[Tensor, int]] = []
        self._dtype: torch.dtype | None = None
        self._kept: CastFactors | None = None

    def get(self, factors: Factors, dtype: torch.dtype) -> CastFactors | None:
        """The cast factors; None where nothing may be kept, in inference mode."""
        given = [factors.u, factors.v, factors.sigma]
        given += [] if factors.bias is None else [factors.bias]
        if torch.is_inference_mode_enabled() or any(t.is_inference() for t in given):
            return None
        if self._kept is None or not self._is_of(given, dtype):
            with torch.no_grad():
                self._kept = cast_factors(factors.u, factors.v, factors.sigma, factors.bias, dtype)
            self._of, self._dtype = [(t, t._version) for t in given], dtype
        return self._kept

    def clear(self) -> None:
        """Forget what was kept; products that still need it for their gradients have it."""
        self._of, self._kept = [], None

    def _is_of(self, given: list[Tensor], dtype: torch.dtype) -> bool:
        same = dtype == self._dtype and len(given) == len(self._of)
        return same and all(
            tensor is known and tensor._version == version
            for tensor, (known, version) in zip(given, self._of, strict=True)
        )
