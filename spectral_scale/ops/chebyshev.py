"""Filters of large sparse graphs as Chebyshev polynomials of the Laplacian: no eigenvectors.

Hammond, Vandergheynst, Gribonval (arXiv 0912.3848), section 6. The error of the polynomial on the
spectrum, and so that of the filtered signal relative to the signal in the 2-norm, is at most the
tolerance.
"""

import math

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError
from spectral_scale.ops.filters import Response
from spectral_scale.ops.laplacian import compressed_rows

TOLERANCE = 1e-3
"""Default largest error, relative to the signal."""
MAX_DEGREE = 128
SAMPLES = 2048
"""Points at which a response is interpolated to find its coefficients."""


def coefficients(respond: Response, bound: float, tolerance: float = TOLERANCE) -> Tensor:
    """Chebyshev coefficients of h on [0, bound], float64, of the lowest sufficient degree.

    The coefficients left out sum to at most `tolerance` in absolute value, which bounds the error
    at every frequency. The first coefficient is halved already.

    Raises:
        ConfigError: h needs a degree above 128 (steps never converge).
    """
    angles = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) * (math.pi / SAMPLES)
    values = respond(0.5 * bound * (angles.cos() + 1.0))
    orders = torch.arange(SAMPLES // 2, dtype=torch.float64)
    found = (2.0 / SAMPLES) * torch.cos(orders[:, None] * angles) @ values
    found[0] *= 0.5
    tails = found.abs().flip(0).cumsum(0).flip(0)
    enough = (tails <= tolerance).nonzero()
    length = int(enough[0]) if len(enough) else SAMPLES
    if length > MAX_DEGREE + 1:
        raise ConfigError(
            f"the filter needs a polynomial of degree above {MAX_DEGREE} on a graph this large; "
            "lower its strength, or use rational or heat instead of ideal"
        )
    return found[: max(length, 1)]


def scaled_laplacian(laplacian: Tensor, bound: float) -> Tensor:
    """M = 2 (2 L / bound - I), sparse rows, float64: what the recurrence multiplies by."""
    n = laplacian.shape[0]
    coo = laplacian.to_sparse_coo().coalesce()
    nodes = torch.arange(n)
    index = torch.cat([coo.indices(), torch.stack([nodes, nodes])], dim=1)
    shift = torch.full((n,), -2.0, dtype=torch.float64)
    values = torch.cat([coo.values() * (4.0 / bound), shift])
    return compressed_rows(index, values, n)


def apply_polynomial(scaled: Tensor, weights: Tensor, signal: Tensor) -> Tensor:
    """p(L) X for X (n, c), by T_k = M T_{k-1} - T_{k-2}; one sparse product a degree.

    Args:
        scaled: from `scaled_laplacian`, in the signal's dtype and on its device.
        weights: from `coefficients`.
        signal: (n, c), contiguous; best so narrow that a few of its like fit into the cache.
    """
    factors = [float(weight) for weight in weights]
    result = signal * factors[0]
    if len(factors) == 1:
        return result
    before, now = signal, (scaled @ signal).mul_(0.5)
    result.add_(now, alpha=factors[1])
    for factor in factors[2:]:
        before, now = now, torch.addmm(before, scaled, now, beta=-1.0)
        result.add_(now, alpha=factor)
    return result
