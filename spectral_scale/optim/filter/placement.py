"""Where a group is filtered: where its gradients are, in slices on all ranks, or on one rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from spectral_scale.optim.filter.nodes import NodeGroup
from spectral_scale.parallel.exchange import even_slices
from spectral_scale.parallel.pieces import Pieces, Range


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who filters what of a group."""

    group: NodeGroup
    """The nodes."""
    features: int
    """Of a node, over all ranks."""
    span: Range
    """Features that this rank has at hand when it filters."""
    wanted: list[Range] | None
    """By rank, the range of each parameter that it filters; None: those that it holds."""
    is_whole: bool = False
    """Every rank holds, and filters, everything."""
    is_owned: bool = False
    """One rank filters the whole group."""

    @property
    def works_here(self) -> bool:
        """Whether this rank filters any of it."""
        return not self.is_owned or self.span[1] > 0


def place(groups: Sequence[NodeGroup], pieces: Pieces) -> list[Placement]:
    """The cheapest place of each group, the same on every rank.

    A filter mixes nodes, not features. Nodes that are layers need no communication where every rank
    holds the same range of each (whole parameters, ZeRO-3, FSDP2); elsewhere each rank gets a slice
    of all. Nodes inside a matrix that is cut go to one rank, the one with the least to do so far.
    """
    load = [0] * pieces.group.size
    return [_place(group, pieces, load) for group in groups]


def _place(group: NodeGroup, pieces: Pieces, load: list[int]) -> Placement:
    index = pieces.group.index
    numel = prod(pieces.shapes[group.fqns[0]])
    features = numel if group.cut is None else numel // group.num_nodes
    held = [pieces.held(fqn) for fqn in group.fqns]
    if all(range_ == (0, numel) for ranges in held for range_ in ranges):
        return Placement(
            group=group, features=features, span=(0, features), wanted=None, is_whole=True
        )
    if group.cut is None:
        aligned = all(ranges == held[0] for ranges in held)
        wanted = None if aligned else even_slices(numel, len(load))
        span = (held[0] if wanted is None else wanted)[index]
        return Placement(group=group, features=features, span=span, wanted=wanted)
    owner = load.index(min(load))
    load[owner] += numel
    return Placement(
        group=group,
        features=features,
        span=(0, features if owner == index else 0),
        wanted=[(0, numel if rank == owner else 0) for rank in range(len(load))],
        is_owned=True,
    )
