"""Flat ranges from the ranks that hold them to the ranks that need them, and back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_scale.parallel.pieces import ShardGroup
from spectral_scale.parallel.ranges import Range

Ranges = Sequence[Sequence[Range]]
"""[tensor][rank of the group] -> range."""


class Exchange:
    """One all-to-all there, one back, for many tensors at once; what stays is copied, not sent.

    Args:
        held: where the elements are; the ranges of a tensor are disjoint and cover `wanted`.
        wanted: where they are needed, disjoint too.
        group: the ranks.

    A rank sends the elements that it holds and another wants: at most what it holds.
    """

    def __init__(self, held: Ranges, wanted: Ranges, group: ShardGroup) -> None:
        self._group = group
        self._held = [ranges[group.index] for ranges in held]
        self._wanted = [ranges[group.index] for ranges in wanted]
        others = range(group.size)
        self._out = [_common(self._held, [w[r] for w in wanted]) for r in others]
        self._in = [_common([h[r] for h in held], self._wanted) for r in others]

    def forward(self, parts: Sequence[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
        """Held ranges, 1-D tensors in order, to wanted ranges. Collective over the group."""
        return self._move(parts, self._held, self._wanted, self._out, self._in, dtype)

    def backward(self, parts: Sequence[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
        """Wanted ranges back to held ones. Collective over the group."""
        return self._move(parts, self._wanted, self._held, self._in, self._out, dtype)

    def _move(
        self,
        parts: Sequence[Tensor],
        have: Sequence[Range],
        want: Sequence[Range],
        out: Sequence[Sequence[Range]],
        into: Sequence[Sequence[Range]],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        mine, device = self._group.index, parts[0].device
        result = [torch.zeros(numel, dtype=dtype, device=device) for _, numel in want]
        for source, have_range, target, want_range, common in zip(
            parts, have, result, want, out[mine], strict=True
        ):
            _within(target, want_range, common).copy_(_within(source, have_range, common))
        outgoing = [
            _within(part, range_, common).to(dtype)
            for rank, commons in enumerate(out)
            if rank != mine
            for part, range_, common in zip(parts, have, commons, strict=True)
        ]
        sizes_in = [0 if r == mine else sum(n for _, n in c) for r, c in enumerate(into)]
        sizes_out = [0 if r == mine else sum(n for _, n in c) for r, c in enumerate(out)]
        received = torch.empty(sum(sizes_in), dtype=dtype, device=device)
        sent = torch.cat(outgoing) if outgoing else received.new_empty(0)
        dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=self._group.handle)
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


def even_slices(numel: int, parts: int) -> list[Range]:
    """`numel` elements in `parts` consecutive ranges whose lengths differ by at most one."""
    bounds = [numel * index // parts for index in range(parts + 1)]
    return [(start, stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _common(first: Sequence[Range], second: Sequence[Range]) -> list[Range]:
    """The elements in both, tensor by tensor."""
    found = []
    for (a, n), (b, m) in zip(first, second, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        found.append((start, stop - start) if stop > start else (a, 0))
    return found


def _within(part: Tensor, range_: Range, common: Range) -> Tensor:
    """The elements `common` of the tensor that holds `range_`."""
    if not common[1]:
        return part[:0]
    return part.narrow(0, common[0] - range_[0], common[1])
