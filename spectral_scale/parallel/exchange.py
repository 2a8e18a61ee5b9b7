"""Flat ranges sent from the ranks that hold them to the ranks that need them, and back.

One tensor of 6 elements on 2 ranks, which rank 1 needs whole:

    held [(0, 4), (4, 2)]     wanted [(0, 0), (0, 6)]
    forward:   rank 0 sends elements 0-3 to rank 1, which copies its own 4-5
    backward:  rank 1 sends elements 0-3 to rank 0 and keeps 4-5

The same tensor, held whole by both ranks, of which each needs one half:

    held [(0, 6), (0, 6)]     wanted [(0, 3), (3, 3)]
    forward:   only the first holder sends: rank 0 copies 0-2 and sends 3-5 to rank 1
    backward:  every holder gets everything: rank 0 sends 0-2, rank 1 sends 3-5

Every rank computes from the same tables who sends what to whom, so that no sizes travel. A message
to a rank holds the intersections of ranges, tensor after tensor, in the order of the tables.

Invariant: what rank a expects from rank b is what rank b sends to a, because both are the
intersection of the same two ranges; a wanted element arrives exactly once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_scale.parallel.flat_shards import ShardGroup
from spectral_scale.parallel.shard_geometry import Range

Ranges = Sequence[Sequence[Range]]
"""[tensor][rank of the group] -> range."""


class Exchange:
    """One all-to-all forward and one backward for many tensors; what stays is copied, not sent.

    Args:
        held: where the elements are; they cover `wanted`. Ranges of a tensor are the same or have
            no element in common.
        wanted: where the elements are needed; no element twice.
        group: the ranks.

    Forward, the first rank that holds an element sends it, at most all that it holds. Backward,
    every rank that holds the element gets it.
    """

    def __init__(self, held: Ranges, wanted: Ranges, group: ShardGroup) -> None:
        self._group = group
        sent = [_first_of_equals(ranges) for ranges in held]
        self._held, self._sent, self._wanted = (
            [ranges[group.index] for ranges in table] for table in (held, sent, wanted)
        )
        others = range(group.size)
        wants, holds, sends = ([[t[r] for t in x] for r in others] for x in (wanted, held, sent))
        self._there = (
            [_common(self._sent, of_rank) for of_rank in wants],
            [_common(of_rank, self._wanted) for of_rank in sends],
        )
        self._back = (
            [_common(self._wanted, of_rank) for of_rank in holds],
            [_common(of_rank, self._held) for of_rank in wants],
        )

    def forward(self, tensors: Sequence[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
        """Held ranges, 1-D tensors in order, to wanted ranges. Collective over the group."""
        own = [tensor[:n] for tensor, (_, n) in zip(tensors, self._sent, strict=True)]
        return self._move(own, self._sent, self._wanted, *self._there, dtype)

    def backward(self, tensors: Sequence[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
        """Wanted ranges back to held ones. Collective over the group."""
        return self._move(tensors, self._wanted, self._held, *self._back, dtype)

    def _move(
        self,
        tensors: Sequence[Tensor],
        have: Sequence[Range],
        want: Sequence[Range],
        out: Sequence[Sequence[Range]],
        into: Sequence[Sequence[Range]],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        mine, device = self._group.index, tensors[0].device
        result = [torch.zeros(numel, dtype=dtype, device=device) for _, numel in want]
        for source, have_range, target, want_range, common in zip(
            tensors, have, result, want, out[mine], strict=True
        ):
            _within(target, want_range, common).copy_(_within(source, have_range, common))
        outgoing = [
            _within(tensor, range_, common).to(dtype)
            for rank, commons in enumerate(out)
            if rank != mine
            for tensor, range_, common in zip(tensors, have, commons, strict=True)
        ]
        sizes_in = [0 if r == mine else sum(n for _, n in c) for r, c in enumerate(into)]
        sizes_out = [0 if r == mine else sum(n for _, n in c) for r, c in enumerate(out)]
        received = torch.empty(sum(sizes_in), dtype=dtype, device=device)
        sent = torch.cat(outgoing) if outgoing else received.new_empty(0)
        self._group.shards.all_to_all(received, sent, sizes_in, sizes_out)
        self._place(received, result, want, into)
        return result

    def _place(
        self,
        received: Tensor,
        result: Sequence[Tensor],
        want: Sequence[Range],
        into: Sequence[Sequence[Range]],
    ) -> None:
        done = 0
        for rank, commons in enumerate(into):
            if rank == self._group.index:
                continue
            for target, range_, common in zip(result, want, commons, strict=True):
                _within(target, range_, common).copy_(received[done : done + common[1]])
                done += common[1]


def even_slices(numel: int, count: int) -> list[Range]:
    """`numel` elements in `count` consecutive ranges whose lengths differ by at most one."""
    bounds = [numel * index // count for index in range(count + 1)]
    return [(start, stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _first_of_equals(ranges: Sequence[Range]) -> list[Range]:
    """The ranges, with those empty that an earlier rank holds as well."""
    return [
        range_ if ranges.index(range_) == rank else (range_[0], 0)
        for rank, range_ in enumerate(ranges)
    ]


def _common(first: Sequence[Range], second: Sequence[Range]) -> list[Range]:
    """The elements that are in both ranges, tensor by tensor."""
    found = []
    for (a, n), (b, m) in zip(first, second, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        found.append((start, stop - start) if stop > start else (a, 0))
    return found


def _within(tensor: Tensor, range_: Range, common: Range) -> Tensor:
    """The elements `common` of `tensor`, which holds the elements `range_`."""
    if not common[1]:
        return tensor[:0]
    return tensor.narrow(0, common[0] - range_[0], common[1])
