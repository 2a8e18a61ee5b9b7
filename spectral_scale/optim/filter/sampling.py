"""Sampled entries: the same ones on every number of ranks, each held by exactly one of them.

Comparing gradients, and telling how far parameters have moved, takes a few thousand of millions of
entries. Sampling, unlike a projection, adds up nothing over ranks: no rounding depends on them.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from spectral_scale.ops.keyed_random import keyed_uniform
from spectral_scale.optim.filter.measure import Sums
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.flat_shards import ParameterShards, is_first_holder
from spectral_scale.parallel.shard_geometry import FlatOrder, Range

DRIFT_ENTRIES = 1024
"""Entries of a parameter from which its drift is estimated."""


def sampled_entries(size: int, count: int, *key: object) -> Tensor:
    """At most `count` of `size` positions, ascending int64, one drawn from each equal stretch."""
    if size <= count:
        return torch.arange(size)
    bounds = torch.arange(count + 1) * size // count
    offsets = torch.from_numpy(keyed_uniform(count, *key, "entries")) * bounds.diff()
    return bounds[:-1] + offsets.long()


class Sample:
    """The sampled entries of a flat tensor that lie in one range of it, in their order there.

    An example: 4 of 8 entries are drawn, at places 0, 3, 5 and 6, and this rank holds the range
    [4, 8): `first` is 2, because two sampled entries come before, and `index` is [1, 2].

    Args:
        order: flat order of the tensor.
        span: the range.
        count: the most entries to draw from the whole tensor.
        key: fixes the draw.
    """

    def __init__(self, order: FlatOrder, span: Range, count: int, *key: object) -> None:
        self._order = order
        self._drawn = sampled_entries(order.numel, count, *key)
        places, self._by_place = order.places(self._drawn).sort()
        self.first, self.index = places_in_range(places, span)
        """Number of sampled entries before the range, and places in it from its start (int64)."""
        self.total = len(places)
        """Number of sampled entries in the whole tensor."""

    def read(self, read: ReadTensor, name: str, column_blocks: int, *rows: int) -> Tensor:
        """The entries of this range from a checkpoint's tensor (*rows, total).

        Where the checkpoint's tensors lay in another number of column blocks, they are reordered.
        """
        size = len(self.index)
        if column_blocks == self._order.column_blocks:
            return read(name, offset=(*(0 for _ in rows), self.first), shape=(*rows, size))
        saved = FlatOrder(self._order.shape, column_blocks).places(self._drawn).argsort().argsort()
        return read(name)[..., saved[self._by_place[self.first : self.first + size]]]


def places_in_range(places: Tensor, span: Range) -> tuple[int, Tensor]:
    """Positions within a range: index of the first, and all relative to the range's start."""
    start, numel = span
    inside = (places >= start) & (places < start + numel)
    first = int((places < start).sum())
    return first, places[inside] - start


class Drift:
    """Estimates the distance of parameters from their start, using sampled entries.

    Args:
        shards: where the values are.
        fqns: parameters to watch, as they are now.
        seed: fixes the entries.
    """

    def __init__(self, shards: ParameterShards, fqns: list[str], *, seed: int) -> None:
        self._shards = shards
        self._samples: dict[str, Sample] = {}
        self._index: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        for fqn in fqns:
            span = shards.ranges(fqn)[shards.group.index]
            sample = Sample(shards.order(fqn), span, DRIFT_ENTRIES, seed, "drift", fqn)
            self._samples[fqn] = sample
            self._index[fqn] = sample.index.to(shards.value(fqn).device)
        self.restart(fqns)

    def restart(self, fqns: list[str]) -> None:
        """Measure from the present values of these parameters on."""
        for fqn in fqns:
            self._start[fqn] = self._now(fqn)

    def add(self, fqn: str, sums: Sums) -> None:
        """Add the squared change of this rank's entries, and their squares at the start."""
        if not is_first_holder(self._shards, fqn):
            return
        start = self._start[fqn].double()
        sums.add("drift", (self._now(fqn).double() - start).square().sum())
        sums.add("anchor", start.square().sum())

    def state_chunks(self, *, own: bool) -> Iterator[TensorChunk]:
        """The starting values of this rank's entries: all, or those that no earlier rank holds."""
        for fqn, value in self._start.items():
            sample = self._samples[fqn]
            if value.numel() and (own or is_first_holder(self._shards, fqn)):
                yield TensorChunk(f"filter/drift/{fqn}", value, (sample.total,), (sample.first,))

    def load_state(self, read: ReadTensor, column_blocks: Mapping[str, int]) -> None:
        """Overwrite the starting values from a checkpoint with its numbers of column blocks."""
        for fqn, value in self._start.items():
            if value.numel():
                name, blocks = f"filter/drift/{fqn}", column_blocks[fqn]
                value.copy_(self._samples[fqn].read(read, name, blocks))

    @property
    def nbytes(self) -> int:
        """Bytes kept on this rank."""
        return sum(value.nbytes for value in self._start.values())

    def _now(self, fqn: str) -> Tensor:
        """A copy of the sampled entries that this rank holds."""
        return self._shards.value(fqn)[self._index[fqn]]
