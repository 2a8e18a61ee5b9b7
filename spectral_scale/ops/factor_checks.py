"""Whether factors are an SVD of their matrix: cheap checks by random vectors.

For a random vector y of independent entries of variance 1, the mean of |E y|^2 is the sum of the
squares of all entries of E. So |E y| shows how far E = U^T U - I and E = W - U diag(sigma) V^T are
from zero without either being formed, in the time of a few vectors times a matrix, against the
m n^2 operations of the SVD itself. One wrong column among thousands shows.
"""

import torch
from torch import Tensor

from spectral_scale.ops.keyed_random import keyed_uniform

PROBES = 4
"""Number of random vectors, over which the mean square is taken."""
TOLERANCE = 16.0
"""Errors allowed, in units of sqrt(k) eps for directions and max(m, n) eps for the residual."""


def directions_problem(u: Tensor, v: Tensor) -> str | None:
    """What is wrong with the columns of u (m, k) and v (n, k), which must be orthonormal."""
    for name, factor in (("left", u), ("right", v)):
        found = orthogonality_norm(factor)
        allowed = _directions_tolerance(factor)
        if not found <= allowed:
            return (
                f"the {name} directions are not orthonormal: |F^T F - I| is about {found:.1e}, "
                f"at most {allowed:.1e} is allowed"
            )
    return None


def residual_problem(weight: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> str | None:
    """What is wrong with u diag(sigma) v^T as `weight` (m, n), relative to the largest value."""
    found = residual_norm(weight, u, sigma, v)
    allowed = TOLERANCE * max(weight.shape) * torch.finfo(weight.dtype).eps
    if not found <= allowed:
        return (
            f"the factors are not those of the matrix: |W - U S V^T| is about {found:.1e} of the "
            f"largest singular value, at most {allowed:.1e} is allowed"
        )
    return None


def orthogonality_norm(factor: Tensor) -> float:
    """About the Frobenius norm of F^T F - I of a factor (rows, k)."""
    probes = _probes(factor.shape[1], factor)
    return _mean_norm(factor.mT @ (factor @ probes) - probes)


def residual_norm(weight: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> float:
    """About the Frobenius norm of W - u diag(sigma) v^T over the largest singular value."""
    scale = sigma.max().clamp_min(torch.finfo(sigma.dtype).tiny)
    probes = _probes(weight.shape[1], weight) / scale
    return _mean_norm(weight @ probes - u @ (sigma[:, None] * (v.mT @ probes)))


def _directions_tolerance(factor: Tensor) -> float:
    columns = factor.shape[1]
    return TOLERANCE * (max(factor.shape) * columns) ** 0.5 * torch.finfo(factor.dtype).eps


def _probes(rows: int, like: Tensor) -> Tensor:
    """(rows, PROBES) entries of mean 0 and variance 1, the same in every run."""
    uniform = torch.from_numpy(keyed_uniform(rows * PROBES, "factor checks"))
    return ((uniform - 0.5) * 12**0.5).view(rows, PROBES).to(like)


def _mean_norm(errors: Tensor) -> float:
    """Root of the mean square of the columns' norms; NaN counts as infinitely wrong."""
    return float(errors.double().square().sum().div(PROBES).sqrt())
