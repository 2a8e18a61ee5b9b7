"""Thin SVD with a fixed gauge and a chain of fall-backs, and measures of its factors.

Factors are stored as u (m, k), sigma (k,), v (n, k), so that W = (u * sigma) @ v.T.
"""

import logging

import torch
from torch import Tensor

from spectral_scale.ops.factor_checks import directions_problem, residual_problem
from spectral_scale.ops.null_space import fix_null_space
from spectral_scale.ops.precision import exact_products
from spectral_scale.ops.svd_drivers import drivers

logger = logging.getLogger(__name__)

SVDFactors = tuple[Tensor, Tensor, Tensor]


def compose(u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """W (m, n) = u diag(sigma) v^T, without TF32."""
    with exact_products():
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

    Tries the drivers of `svd_drivers` until one returns factors that are finite, orthonormal and
    those of the matrix (`factor_checks`); the last is float64 on the CPU. A wide matrix is handed
    over as its transpose: LAPACK takes three times as long for 2048 x 8192 as for 8192 x 2048.
    Directions of vanishing values do not depend on rounding (`fix_null_space`).

    Raises ValueError for a matrix that is not finite, LinAlgError if every driver fails, and at
    once what no other driver can mend: OutOfMemoryError, and errors of the GPU itself.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the matrix holds NaN or infinity")
    failures = []
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.mT if wide else weight
    for name, driver in drivers(tall, on_cuda=weight.is_cuda):
        try:
            with exact_products():
                found = _checked(weight, driver(tall), wide)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:  # LAPACK's LinAlgError, and cuSOLVER's errors of status
            failures.append(f"{name}: {error}")
            continue
        if failures:
            logger.warning("SVD fell back to %s after %s", name, "; ".join(failures))
        return found
    raise torch.linalg.LinAlgError("no SVD driver succeeded: " + "; ".join(failures))


def _checked(weight: Tensor, found: SVDFactors, wide: bool) -> SVDFactors:
    """A driver's U, sigma, V^T of the tall matrix as factors of `weight`, in their final form.

    Raises LinAlgError if they are not an SVD of it.
    """
    left, sigma, right_h = found
    factors = (right_h.mT, sigma, left) if wide else (left, sigma, right_h.mT)
    if not all(bool(torch.isfinite(t).all()) for t in factors):
        raise torch.linalg.LinAlgError("the factors are not finite")
    u, sigma, v = (t.to(weight.device, weight.dtype).contiguous() for t in factors)
    problem = residual_problem(weight, u, sigma, v)
    u, sigma, v = fix_null_space(*fix_gauge(u, sigma, v))
    rank = int((sigma > 0).sum())  # the other directions are fix_null_space's own
    problem = problem or directions_problem(u[:, :rank], v[:, :rank])
    if problem is not None:
        raise torch.linalg.LinAlgError(problem)
    return u, sigma, v


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
