"""Thin SVD with a fixed gauge and a chain of fall-backs, and measures of its factors.

Factors are stored as u (m, k), sigma (k,), v (n, k), so that W = (u * sigma) @ v.T.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from spectral_scale.ops.null_space import fix_null_space

logger = logging.getLogger(__name__)

SVDFactors = tuple[Tensor, Tensor, Tensor]


def compose(u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """W (m, n) = u diag(sigma) v^T."""
    if v.shape[0] < u.shape[0]:  # scale, and so copy, the smaller factor
        return u @ (v * sigma).mT
    return (u * sigma) @ v.mT


def fix_gauge(u: Tensor, sigma: Tensor, v: Tensor) -> SVDFactors:
    """Flip each pair (u_i, v_i) so that u_i's largest-magnitude entry is positive.

    A matrix fixes each pair only up to a common sign: u_1 = (0.6, -0.8), v_1 = (1, 0) and
    u_1 = (-0.6, 0.8), v_1 = (-1, 0) are the same triplet, and drivers return either. Factors are
    trained and saved, so they must not depend on the driver, the device or the thread count: the
    rule takes the second pair, whose entry of size 0.8 is positive. Both vectors are flipped
    together, so the product u diag(sigma) v^T is unchanged to the bit.
    """
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, sigma, v * signs


def svd(weight: Tensor) -> SVDFactors:
    """Thin SVD u (m, k), sigma (k,) descending, v (n, k) of `weight` (m, n), in its own dtype.

    Tries the default driver, then (CUDA) gesvd, then float64 on the CPU. A wide matrix is handed
    over as its transpose: LAPACK takes three times as long for 2048 x 8192 as for 8192 x 2048.
    Directions of vanishing values do not depend on rounding (`fix_null_space`).
    Raises ValueError for a matrix that is not finite, and LinAlgError if every driver fails.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the matrix holds NaN or infinity")
    failures = []
    wide = weight.shape[0] < weight.shape[1]
    for name, attempt in _drivers(weight.mT if wide else weight):
        try:
            left, sigma, right_h = attempt()
        except torch.linalg.LinAlgError as error:
            failures.append(f"{name}: {error}")
            continue
        factors = (right_h.mT, sigma, left) if wide else (left, sigma, right_h.mT)
        if all(bool(torch.isfinite(t).all()) for t in factors):
            if failures:
                logger.warning("SVD fell back to %s after %s", name, "; ".join(failures))
            u, sigma, v = (t.to(weight.device, weight.dtype).contiguous() for t in factors)
            return fix_null_space(*fix_gauge(u, sigma, v))
        failures.append(f"{name}: the factors are not finite")
    raise torch.linalg.LinAlgError("no SVD driver succeeded: " + "; ".join(failures))


def _drivers(weight: Tensor) -> list[tuple[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]]:
    thin = torch.linalg.svd
    drivers: list[tuple[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]] = [
        ("the default driver", lambda: thin(weight, full_matrices=False))
    ]
    if weight.is_cuda:
        drivers.append(("gesvd", lambda: thin(weight, full_matrices=False, driver="gesvd")))
    drivers.append(
        ("float64 on the CPU", lambda: thin(weight.to("cpu", torch.float64), full_matrices=False))
    )
    return drivers


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of sigma / sum sigma (Roy and Vetterli 2007); 0 for a zero spectrum."""
    values = sigma.detach().double()
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values / total
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))


def orthogonality_error(factor: Tensor) -> float:
    """Largest entry of |F^T F - I| of a factor (rows, k)."""
    gram = factor.mT @ factor
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())
