"""The joint decomposition of same-width matrices behind FRoD (Wan et al., arXiv 2512.23485).

Matrices W_i (m_i x n) of one category share V: W_i = U_i diag(lambda_i) V^T, exactly. With the thin
QR of their stack, W_i = Q_i R, and T = mean (Q_i^T Q_i + ridge I)^-1 = Z diag(tau) Z^T, it is
V = R^T Z (higher-order CSD; Kempf, Goulart and Duncan, arXiv 2102.09822). Everything follows from
the n x n Gram matrices G_i = W_i^T W_i: R is the Cholesky factor of their sum and
Q_i^T Q_i = R^-T G_i R^-1. So the stack never exists, and ranks that hold different matrices only
add n x n sums, in float64 because G squares the condition number.

An example with ridge 0: W_1 = diag(1, 2), W_2 = diag(1, 1).

    G_1 = diag(1, 4), G_2 = diag(1, 1)          sum diag(2, 5), so R = diag(1.414, 2.236)
    Q_i^T Q_i = R^-T G_i R^-1                   diag(0.5, 0.8) and diag(0.5, 0.2)
    T = mean of the inverses                    diag(2, 3.125), so Z = I
    V = R^T Z                                   diag(1.414, 2.236); V^-T = diag(0.707, 0.447)
    lambda_i = column lengths of W_i V^-T       (0.707, 0.894) and (0.707, 0.447)

Check: W_1 = U_1 diag(lambda_1) V^T = I diag(0.707, 0.894) diag(1.414, 2.236) = diag(1, 2).

Invariant: the reconstruction is exact for any invertible V, whatever the ridge, which only takes
part in choosing V. The columns of U_i have unit length, and are orthogonal only in special cases.

Shape suffixes: O out_features (m_i), I in_features (n).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONDITION_LIMIT = 1e5
"""Largest |R|_F |R^-1|_F / n of a stack; one beyond it is treated as singular."""
DEAD = 1e-6
"""Columns of W V^-T shorter than this fraction of the longest one count as zero."""
_FIXED_POINT_BITS = 61
"""Bits of a fixed-point sum.

Floating-point sums depend on the order of their terms, and with it on the number of ranks. Here an
entry is a multiple of 2^(e - 61), where 2^e exceeds the sum of all terms' bounds. So a total of all
ranks stays within 2^61 and int64 cannot overflow, integer sums do not round, and the basis has the
same bits on every number of ranks. With a bound of 3 and 2 matrices, e = 3 (6 < 8) and one unit is
2^-58.
"""


@dataclass(frozen=True, kw_only=True)
class JointBasis:
    """The basis that all matrices of a category have in common; columns of V differ in length."""

    v: Tensor
    """(n, n) V, of full rank; orthogonal only for a singular stack."""
    v_inverse_t: Tensor
    """(n, n) V^-T = R^-1 Z."""
    singular: bool
    """The stack had no full column rank: V holds the eigenvectors of the summed Gram matrices."""


def gram(weight_OI: Tensor) -> Tensor:
    """W^T W (n, n) in float64. Gram matrices of shards of rows add up to the whole one's."""
    exact = weight_OI.detach().double()
    return exact.t() @ exact


def triangular_factor(total_II: Tensor) -> tuple[Tensor, Tensor] | None:
    """R (upper) and R^-1 of a sum of Gram matrices; None if the stack is singular.

    Raises ValueError for a sum that is zero or not finite.
    """
    if not bool(torch.isfinite(total_II).all()):
        raise ValueError("a matrix holds NaN or infinity")
    if not bool(total_II.any()):
        raise ValueError("all matrices are zero")
    r, info = torch.linalg.cholesky_ex(total_II, upper=True)
    if int(info):
        return None
    inverse = invert_triangular(r)
    condition = float(r.norm() * inverse.norm()) / r.shape[0]
    return None if not condition < CONDITION_LIMIT else (r, inverse)


def invert_triangular(r_II: Tensor) -> Tensor:
    """R^-1 of an upper triangular R."""
    eye = torch.eye(r_II.shape[0], dtype=r_II.dtype, device=r_II.device)
    return torch.linalg.solve_triangular(r_II, eye, upper=True)


def ridge_inverse(gram_II: Tensor, r_inverse_II: Tensor, ridge: float) -> Tensor:
    """(Q^T Q + ridge I)^-1 with Q^T Q = R^-T G R^-1; no eigenvalue is above 1 / ridge."""
    inner = r_inverse_II.t() @ gram_II @ r_inverse_II
    inner.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(inner))


def common_basis(mean_inverse_II: Tensor, r_II: Tensor, r_inverse_II: Tensor) -> JointBasis:
    """V = R^T Z and V^-T = R^-1 Z, from the mean of the ridge inverses."""
    z = _eigenvectors(mean_inverse_II)
    return _with_fixed_signs(r_II.t() @ z, r_inverse_II @ z, singular=False)


def orthogonal_basis(total_II: Tensor) -> JointBasis:
    """V = V^-T = the right singular vectors of a singular stack, those of its null space last."""
    z = _eigenvectors(total_II).flip(1)
    return _with_fixed_signs(z, z.clone(), singular=True)


def column_lengths(weight_OI: Tensor, v_inverse_t_II: Tensor) -> Tensor:
    """lambda (n,): the column lengths of W V^-T = U diag(lambda), float64."""
    product = weight_OI.detach().double() @ v_inverse_t_II.double()
    return torch.linalg.vector_norm(product, dim=0)


def inverse_lengths(lengths: Tensor) -> Tensor:
    """1 / lambda, and 0 for dead columns (see DEAD): nothing defines their u, so it is zero."""
    alive = lengths > DEAD * lengths.max()
    return torch.where(alive, lengths.clamp_min(torch.finfo(lengths.dtype).tiny).reciprocal(), 0.0)


def joint_basis(
    weights: Sequence[Callable[[], Tensor]],
    ridge: float,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda total: total,
    largest: float,
    count: int,
    width: int,
    device: torch.device | str = "cpu",
) -> JointBasis:
    """The basis of a category from the matrices that this rank owns. All ranks get the same.

    Each matrix is read twice and held alone; beside it live a few n x n matrices in float64. The
    sums are exact, so that the basis depends neither on the number of ranks nor on their order.

    Args:
        weights: read one matrix (m_i, n) each; empty on a rank that owns none.
        ridge: pi.
        sum_over_ranks: adds an int64 (n, n) tensor up over all ranks, in place.
        largest: the largest squared Frobenius norm of the matrices of the category.
        count: number of matrices of the category, over all ranks.
        width: n.
        device: where to compute.

    Raises ValueError for matrices that are not finite or all zero.
    """
    if not math.isfinite(largest):
        raise ValueError("a matrix holds NaN or infinity")
    if largest == 0.0:
        raise ValueError("all matrices are zero")

    def exact_sum(terms: Callable[[Tensor], Tensor], bound: float) -> Tensor:
        exponent = math.frexp(bound * count)[1]
        total = torch.zeros(width, width, dtype=torch.int64, device=device)
        for read in weights:
            total += _to_fixed_point(terms(gram(read().to(device))), exponent)
        return _from_fixed_point(sum_over_ranks(total), exponent)

    total = exact_sum(lambda g: g, largest)
    factor = triangular_factor(total)
    if factor is None:
        return orthogonal_basis(total)
    r, r_inverse = factor
    mean = exact_sum(lambda g: ridge_inverse(g, r_inverse, ridge), 1.0 / ridge).div_(count)
    return common_basis(mean, r, r_inverse)


def _to_fixed_point(values: Tensor, exponent: int) -> Tensor:
    """Integers that add up without rounding: multiples of 2^(exponent - 61)."""
    return (values * 2.0 ** (_FIXED_POINT_BITS - exponent)).round().long()


def _from_fixed_point(values: Tensor, exponent: int) -> Tensor:
    return values.double() * 2.0 ** (exponent - _FIXED_POINT_BITS)


def _eigenvectors(symmetric_II: Tensor) -> Tensor:
    return torch.linalg.eigh((symmetric_II + symmetric_II.t()) / 2).eigenvectors


def _with_fixed_signs(v: Tensor, v_inverse_t: Tensor, *, singular: bool) -> JointBasis:
    """The largest entry of each column of V is positive: eigenvectors come with either sign, and a
    trained S means another update under another sign."""
    peaks = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    return JointBasis(v=v * peaks, v_inverse_t=v_inverse_t * peaks, singular=singular)
