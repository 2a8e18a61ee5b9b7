"""The positions of the entries of FRoD's sparse matrix S (n x n), and the two products with it.

Entries are off the diagonal and stand in the order of columns, then rows. On the CPU the products
are sparse; elsewhere dense ones are faster (tensor cores) and, unlike sparse ones, reproducible.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from spectral_scale.config.methods.frod import entries
from spectral_scale.errors import ConfigError
from spectral_scale.ops.keyed_random import keyed_uniform


def draw_positions(width: int, sparsity: float, *key: object) -> Tensor:
    """int64 (2, entries): rows and columns, drawn uniformly without replacement off the diagonal.

    A function of the arguments alone. Raises ConfigError if the sparsity selects nothing.
    """
    count = entries(width, sparsity)
    if count < 1:
        raise ConfigError(
            f"spectral.sparsity={sparsity:g} selects none of the {width} x {width} entries of S; "
            f"set it to at least {1 / (width * width):.3g}"
        )
    places = width * (width - 1)
    drawn = np.empty(0, dtype=np.int64)
    attempt = 0
    while drawn.size < count:
        more = keyed_uniform(2 * count + 16, *key, attempt)
        together = np.concatenate([drawn, (more * places).astype(np.int64)])
        _, first = np.unique(together, return_index=True)
        drawn = together[np.sort(first)]
        attempt += 1
    column, place = np.divmod(np.sort(drawn[:count]), width - 1)
    row = place + (place >= column)  # skips the diagonal
    return torch.from_numpy(np.stack([row, column]))


class Pattern:
    """The positions of S of one category, arranged for the products.

    Args:
        positions: int64 (2, entries), rows and columns, sorted by column, then row.
        width: n.
        sparse: use sparse products; by default where the positions are on the CPU.
    """

    def __init__(self, positions: Tensor, width: int, *, sparse: bool | None = None) -> None:
        self.positions, self.width = positions, width
        self._sparse = positions.device.type == "cpu" if sparse is None else sparse
        self._rows, columns = positions.unbind()
        counts = torch.bincount(columns, minlength=width)
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._flat = columns * width + self._rows  # in S^T, row-major

    def apply(self, values: Tensor, u_IO: Tensor) -> Tensor:
        """S^T U^T (n, m) for S's values (entries,) and U^T (n, m)."""
        return self._transposed(values.to(u_IO.dtype)) @ u_IO

    def products(self, u_IO: Tensor, h_IO: Tensor) -> Tensor:
        """(entries,): for entry (p, q) the dot product of row p of u and row q of h."""
        if not self._sparse:
            return (h_IO @ u_IO.t()).view(-1)[self._flat]
        zeros = self._transposed(u_IO.new_zeros(self._rows.numel()))
        found: Tensor = torch.sparse.sampled_addmm(zeros, h_IO, u_IO.t(), beta=0.0)
        return found.values()

    def _transposed(self, values: Tensor) -> Tensor:
        """S^T as a matrix."""
        shape = (self.width, self.width)
        if not self._sparse:
            dense = values.new_zeros(self.width * self.width)
            return dense.index_copy_(0, self._flat, values).view(shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self._starts, self._rows, values, shape, check_invariants=False
            )
