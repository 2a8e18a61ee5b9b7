"""The truth of every converted matrix: the weight in full precision, owned by one rank.

A layer holds the weight in the precision of products. What trained is added to the truth alone, and
the layer's copy is cast from it again, so that no rounding accumulates over swaps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectral_scale.ops.precision import exact_products


@dataclass(kw_only=True)
class Entry:
    """One matrix."""

    weight: Tensor
    """The weight (m, n) as of the last swap."""
    basis: dict[str, Tensor] = field(default_factory=dict)
    """State of its bases; empty before the first draw."""


class OwnedWeights:
    """Weights of the matrices that this rank owns, outside the module tree.

    Args:
        device: where weights are kept (the model's, or the CPU's memory, pinned).
        compute_device: where they are changed.
        dtype: float32, or float64 for tests.
    """

    def __init__(
        self, *, device: torch.device, compute_device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.compute_device, self.dtype = device, compute_device, dtype
        self._pins = device.type == "cpu" and compute_device.type == "cuda"
        self._entries: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Owned matrices in the order they were added."""
        yield from self._entries.items()

    def nbytes(self) -> int:
        """Bytes of weights and of the states of their bases."""
        entries = self._entries.values()
        return sum(t.nbytes for e in entries for t in (e.weight, *e.basis.values()))

    def put(self, name: str, weight: Tensor, basis: Mapping[str, Tensor] | None = None) -> None:
        """Take a matrix over, onto the device of weights; a copy if `weight` may change.

        Raises ValueError if it is not finite.
        """
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("the matrix holds NaN or infinity")
        kept = self._offloaded(weight.detach().to(self.device, self.dtype, copy=True))
        self._entries[name] = Entry(weight=kept)
        self.set_basis(name, basis or {})

    def set_basis(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Keep the state of a matrix's bases; floating-point tensors in the dtype of weights."""
        self._entries[name].basis = {
            leaf: self._offloaded(t.to(self.device, self.dtype if t.is_floating_point() else None))
            for leaf, t in state.items()
        }

    def present(self, name: str) -> Tensor:
        """The weight on the device of computations; the entry's own tensor if it lies there."""
        return self._entries[name].weight.to(self.compute_device, non_blocking=self._pins)

    @exact_products()
    def merge(self, name: str, c: Tensor, d: Tensor, u0: Tensor, v0: Tensor) -> float:
        """Add u0 c^T + d v0^T to the weight, in place; the update's Frobenius norm over the
        weight's.

        Raises ValueError, before anything is written, if c (n, r) or d (m, r) is not finite.
        """
        if not all(bool(torch.isfinite(t).all()) for t in (c, d)):
            raise ValueError("its trained factors hold NaN or infinity")
        weight = self.present(name)
        c, d = c.to(weight), d.to(weight)
        before = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
        relative = float(update_norm(c, d, u0, v0) / before)
        weight.addmm_(u0, c.t()).addmm_(d, v0.t())
        self._entries[name].weight.copy_(weight)
        return relative

    def _offloaded(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().contiguous()
        return kept.pin_memory() if self._pins else kept


def update_norm(c: Tensor, d: Tensor, u0: Tensor, v0: Tensor) -> Tensor:
    """|u0 c^T + d v0^T| in the Frobenius norm, without the matrix: u0 and v0 are orthonormal, so
    that it is |c|^2 + |d|^2 + 2 trace((u0^T d) (v0^T c)), squared."""
    cross = ((u0.t() @ d) * (v0.t() @ c).t()).sum()
    return (c.square().sum() + d.square().sum() + 2 * cross).clamp_min(0).sqrt()
