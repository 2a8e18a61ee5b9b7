"""Columns of a keyed orthonormal matrix, each computed by itself: no storage and no QR.

Q = S F P, of size n x n: F is a fixed orthonormal transform, S flips the signs of rows and P
permutes columns; both are drawn from the key. F is the Walsh-Hadamard matrix where n is a power of
two, and the matrix of the DCT-II elsewhere:

    Hadamard   F[i, c] = (-1)^popcount(i & c) / sqrt n
    DCT-II     F[i, c] = sqrt(2 / n) cos(pi (2 i + 1) c / (2 n)),  and 1 / sqrt n for c = 0

Invariant: a column is a function of (n, its position, key, dtype) alone, to the bit: entries are
products of signs with one rounded number, or entries of a table that additions and multiplications
of IEEE numbers make. Neither a library's cosine nor the device enters.
"""

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_scale.ops.keyed_random import keyed_uniform

_TERMS = 9
"""Terms of the series of sine and cosine on [0, pi/4]; the next one would be below 1e-20."""


def keyed_columns(
    size: int,
    positions: npt.NDArray[np.int64],
    *key: object,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Columns `positions` of the orthonormal matrix (size, size) of a key: (size, len(positions)).

    keyed_columns(4, [0, 1, 2, 3], key) is a square orthonormal matrix with entries +-1/2.
    """
    columns = np.argsort(keyed_uniform(size, *key, "columns"), kind="stable")[positions]
    signs = np.where(keyed_uniform(size, *key, "signs") < 0.5, -1.0, 1.0)
    transform = _hadamard if size & (size - 1) == 0 else _cosines
    found = transform(size, torch.from_numpy(columns).to(device), dtype)
    return found.mul_(torch.from_numpy(signs).to(found)[:, None])


def _hadamard(size: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of the Walsh-Hadamard matrix, which is a Kronecker product of two smaller ones."""
    low = 1 << ((size.bit_length() - 1) // 2)
    outer, inner = (_sylvester(n, columns.device, dtype) for n in (size // low, low))
    outer = outer[:, columns // low] * (1.0 / math.sqrt(size))
    return (outer[:, None, :] * inner[None, :, columns % low]).view(size, -1)


def _sylvester(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix of signs (-1)^popcount(i & c)."""
    signs = torch.ones(1, 1, device=device, dtype=dtype)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


def _cosines(size: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of the DCT-II, by multiples of pi / (2 size) counted in whole numbers."""
    table = torch.from_numpy(_table(size)).to(columns.device, dtype)
    odd = 2 * torch.arange(size, device=columns.device) + 1
    found = table[(odd[:, None] * columns) % (4 * size)]
    return found.masked_fill_(columns == 0, 1.0 / math.sqrt(size))


@functools.lru_cache(maxsize=16)
def _table(size: int) -> npt.NDArray[np.float64]:
    """sqrt(2 / size) cos(pi t / (2 size)) for t in [0, 4 size)."""
    angles = np.arange(size // 2 + 1, dtype=np.float64) * (math.pi / (2 * size))  # up to pi / 4
    quarter = np.empty(size + 1)
    quarter[: len(angles)] = _series(angles, first=1)
    quarter[size - np.arange(len(angles))] = angles * _series(angles, first=2)  # sine
    half = np.concatenate([quarter, -quarter[-2::-1]])
    scaled: npt.NDArray[np.float64] = np.concatenate([half, half[-2:0:-1]]) * math.sqrt(2 / size)
    return scaled


def _series(x: npt.NDArray[np.float64], *, first: int) -> npt.NDArray[np.float64]:
    """cos x (first = 1) or sin x / x (first = 2) for |x| <= pi / 4, by Horner's rule."""
    square, total = x * x, np.ones_like(x)
    for term in range(_TERMS, -1, -1):
        step = (2 * term + first) * (2 * term + first + 1)
        total = 1.0 - square / step * total
    return total
