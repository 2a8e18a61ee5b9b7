"""Sampled entries: the same ones on every number of ranks, each held by exactly one of them.

Comparing gradients, and telling how far parameters have moved, takes a few thousand of millions of
entries. Sampling, unlike a projection, adds up nothing over ranks: no rounding depends on them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_scale.ops.keyed_random import keyed_uniform
from spectral_scale.optim.filter.measure import Sums
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.pieces import Pieces, Range

DRIFT_ENTRIES = 1024
"""Entries of a parameter from which its drift is estimated."""


def sampled_entries(size: int, count: int, *key: object) -> Tensor:
    """At most `count` of `size` positions, ascending int64, one drawn from each equal stretch."""
    if size <= count:
        return torch.arange(size)
    bounds = torch.arange(count + 1) * size // count
    offsets = torch.from_numpy(keyed_uniform(count, *key, "entries")) * bounds.diff()
    return bounds[:-1] + offsets.long()


def held_part(entries: Tensor, span: Range) -> tuple[int, Tensor]:
    """Of ascending positions those in a range: number of the first, and all relative to it."""
    start, numel = span
    inside = (entries >= start) & (entries < start + numel)
    first = int((entries < start).sum())
    return first, entries[inside] - start


class Drift:
    """How far parameters are from where they started, estimated from sampled entries.

    Args:
        pieces: where the values are.
        fqns: parameters to watch, as they are now.
        seed: fixes the entries.
    """

    def __init__(self, pieces: Pieces, fqns: list[str], *, seed: int) -> None:
        self._pieces = pieces
        self._place: dict[str, tuple[int, int, Tensor]] = {}
        self._start: dict[str, Tensor] = {}
        for fqn in fqns:
            span = pieces.held(fqn)[pieces.group.index]
            size = torch.Size(pieces.shapes[fqn]).numel()
            entries = sampled_entries(size, DRIFT_ENTRIES, seed, "drift", fqn)
            first, kept = held_part(entries, span)
            self._place[fqn] = (first, len(entries), kept.to(pieces.value(fqn).device))
        self.restart(fqns)

    def restart(self, fqns: list[str]) -> None:
        """Measure from the present values of these parameters on."""
        for fqn in fqns:
            self._start[fqn] = self._now(fqn)

    def add(self, fqn: str, sums: Sums) -> None:
        """Add the squared change of this rank's entries, and their squares at the start."""
        if self._pieces.group.index and not spread(self._pieces, fqn):
            return
        start = self._start[fqn].double()
        sums.add("drift", (self._now(fqn).double() - start).square().sum())
        sums.add("anchor", start.square().sum())

    def state_chunks(self, *, own: bool) -> Iterator[TensorChunk]:
        """The starting values of this rank's entries; whole ones from the first rank, or all."""
        for fqn, value in self._start.items():
            first, total, _ = self._place[fqn]
            mine = own or self._pieces.group.index == 0 or spread(self._pieces, fqn)
            if value.numel() and mine:
                yield TensorChunk(f"filter/drift/{fqn}", value, (total,), (first,))

    def load_state(self, read: ReadTensor) -> None:
        """Overwrite them from a checkpoint."""
        for fqn, value in self._start.items():
            first = self._place[fqn][0]
            if value.numel():
                shape = (value.numel(),)
                value.copy_(read(f"filter/drift/{fqn}", offset=(first,), shape=shape))

    @property
    def nbytes(self) -> int:
        """Bytes kept on this rank."""
        return sum(value.nbytes for value in self._start.values())

    def _now(self, fqn: str) -> Tensor:
        """A copy of the sampled entries that this rank holds."""
        return self._pieces.value(fqn)[self._place[fqn][2]]


def spread(pieces: Pieces, fqn: str) -> bool:
    """Whether ranks hold different parts of a parameter."""
    size = torch.Size(pieces.shapes[fqn]).numel()
    return any(numel != size for _, numel in pieces.held(fqn))
