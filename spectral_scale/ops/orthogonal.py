"""Muon's Newton-Schulz iteration on tall matrices, computed from their Gram matrices alone.

Muon (Jordan et al., 2024) replaces a matrix X by nearly its polar factor: X / |X| in the Frobenius
norm, then five times X <- X (a I + b X^T X + c (X^T X)^2). Every factor of that product is a
polynomial of the first X^T X, so that for X (m, r) the iteration runs on r x r matrices:

    A <- X^T X / |X|^2,  Q <- I / |X|;    five times: P = a I + b A + c A^2,  Q <- Q P,  A <- P A P

and X Q is the result. Whoever holds some rows of X needs of the others only the sum of their
r x r Gram matrices.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c as published: singular values above about 1e-3 of the norm end between 0.68 and 1.13."""
ITERATIONS = 5


def polar_multiplier(gram: Tensor) -> Tensor:
    """The r x r matrices Q for which X Q is Muon's approximation of the polar factor of X.

    Computed in double precision, since A loses digits of the smallest singular values twice.

    Args:
        gram: X^T X of each X, (..., r, r).

    Returns Q in the dtype of `gram`; X = 0 gives X Q = 0.
    """
    a, b, c = COEFFICIENTS
    wide = gram.double()
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    square = wide.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    square = square[..., None, None]
    power, multiplier = wide / square, eye * square.rsqrt()
    for _ in range(ITERATIONS):
        step = a * eye + b * power + c * (power @ power)
        multiplier = multiplier @ step
        power = step @ power @ step
    return multiplier.to(gram.dtype)
