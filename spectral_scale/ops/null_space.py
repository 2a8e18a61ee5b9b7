"""Chooses the directions of zero singular values deterministically, independent of rounding.

Where singular values of a matrix vanish (training clamps them at zero), any basis of the null
spaces is a valid part of its SVD, and drivers return one that the last bits decide: runs that
differ by rounding only would train different directions. Here the basis is a smooth function of
the rest of the decomposition.

An example: sigma = (2, 1, 0), and the first two columns of u (4, 3) are e_1 and e_2. Any unit
vector (0, 0, a, b) completes u, and a driver's choice turns with the last bit. The keyed random
vector (0.3, -0.1, 0.2, -0.4) without its part along e_1 and e_2 is (0, 0, 0.2, -0.4), and
normalised (0, 0, 0.447, -0.894). A change of 1e-7 in e_1 moves this result by
about 1e-7, not by a rotation.

Such directions matter, because the draw gives every triplet, also one of value zero, a chance to
train. Invariant: u and v stay orthonormal, and u diag(sigma) v^T changes by rounding alone.
"""

import torch
from torch import Tensor

from spectral_scale.ops.keyed_random import keyed_uniform


def fix_null_space(u: Tensor, sigma: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the directions of vanishing singular values, and set these to zero.

    Args:
        u: (m, k), orthonormal.
        sigma: (k,), descending.
        v: (n, k), orthonormal.

    A value vanishes if it is at most max(m, n) eps times the largest, as in numpy's matrix_rank.
    Returns new tensors, or the given ones if no value vanishes.
    """
    largest = float(sigma[0]) if sigma.numel() else 0.0
    bound = max(u.shape[0], v.shape[0]) * torch.finfo(sigma.dtype).eps * largest
    rank = int((sigma > bound).sum())
    if rank == sigma.numel():
        return u, sigma, v
    sigma = sigma.clone()
    sigma[rank:] = 0
    return _completed(u, rank, "u"), sigma, _completed(v, rank, "v")


def _completed(factor: Tensor, rank: int, side: str) -> Tensor:
    """The first `rank` columns, and further ones orthogonal to them: keyed random vectors, made
    orthogonal in float64."""
    rows, columns = factor.shape
    count = columns - rank
    known = factor[:, :rank].double()
    uniform = keyed_uniform(rows * count, "null space", side)
    random = torch.from_numpy(uniform).view(rows, count).to(known) - 0.5
    for _ in range(2):  # once more against what rounding left
        random -= known @ (known.mT @ random)
    basis, upper = torch.linalg.qr(random)
    basis *= torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return torch.cat([factor[:, :rank], basis.to(factor.dtype)], dim=1).contiguous()
