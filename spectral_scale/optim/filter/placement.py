"""Places each group: on the ranks that hold its gradients, in slices on all ranks, or on one."""

from collections.abc import Sequence
from dataclasses import dataclass

from spectral_scale.errors import ConfigError
from spectral_scale.optim.filter.nodes import NodeGroup
from spectral_scale.parallel.exchange import even_slices
from spectral_scale.parallel.flat_shards import ParameterShards, is_first_holder
from spectral_scale.parallel.shard_geometry import FlatOrder, Range


@dataclass(frozen=True, kw_only=True)
class GraphPlacement:
    """Assignment of one group's work to ranks."""

    group: NodeGroup
    """The nodes."""
    order: FlatOrder
    """Flat order of a node's features over all ranks."""
    span: Range
    """Range of the features that this rank filters."""
    wanted: list[Range] | None
    """Range of each parameter that each rank filters; None if it is the range that it holds."""
    is_sharded: bool = False
    """True if each rank filters some features of every node."""
    counts_here: bool = True
    """True if no earlier rank filters the same features."""
    is_owned: bool = False
    """True if one rank filters the whole group."""

    @property
    def works_here(self) -> bool:
        """True if this rank filters some features of the group."""
        return not self.is_owned or self.span[1] > 0


def place(groups: Sequence[NodeGroup], shards: ParameterShards) -> list[GraphPlacement]:
    """The cheapest place of each group, the same on every rank.

    A filter mixes nodes, not features. Nodes that are layers need no communication where every rank
    holds the same range of each (whole parameters, ZeRO-3, FSDP2); elsewhere each rank gets a slice
    of all. Nodes inside a sharded matrix go to one rank, the one with the least to do so far.
    """
    moved = [group for group in groups if group.blocks is not None and not _is_whole(group, shards)]
    numels = [shards.order(group.fqns[0]).numel for group in moved]
    owners = owners_by_size(numels, shards.group.size)
    owner_of = {group.name: owner for group, owner in zip(moved, owners, strict=True)}
    return [_place(group, shards, owner_of.get(group.name, 0)) for group in groups]


def owners_by_size(numels: Sequence[int], ranks: int) -> list[int]:
    """Deal matrices out in their order: each to the rank with the fewest elements so far."""
    load, owners = [0] * ranks, []
    for numel in numels:
        owners.append(load.index(min(load)))
        load[owners[-1]] += numel
    return owners


def _is_whole(group: NodeGroup, shards: ParameterShards) -> bool:
    """True if every rank holds the whole parameter."""
    numel = shards.order(group.fqns[0]).numel
    return all(range_ == (0, numel) for fqn in group.fqns for range_ in shards.ranges(fqn))


def _place(group: NodeGroup, shards: ParameterShards, owner: int) -> GraphPlacement:
    index, first = shards.group.index, group.fqns[0]
    order = shards.order(first)
    numel = order.numel
    inside = group.blocks is not None
    features = FlatOrder((numel // group.num_nodes,)) if inside else order
    held = [shards.ranges(fqn) for fqn in group.fqns]
    here = is_first_holder(shards, first)
    if _is_whole(group, shards):
        span = (0, features.numel)
        return GraphPlacement(group=group, order=features, span=span, wanted=None, counts_here=here)
    if not inside and all(ranges == held[0] for ranges in held):
        _require_one_order(group, shards)
        span = held[0][index]
        return GraphPlacement(
            group=group, order=features, span=span, wanted=None, is_sharded=True, counts_here=here
        )
    if not inside:
        _require_one_order(group, shards)
        wanted = even_slices(numel, shards.group.size)
        span = wanted[index]
        return GraphPlacement(
            group=group, order=features, span=span, wanted=wanted, is_sharded=True
        )
    return GraphPlacement(
        group=group,
        order=features,
        span=(0, features.numel if owner == index else 0),
        wanted=[(0, numel if rank == owner else 0) for rank in range(shards.group.size)],
        is_owned=True,
    )


def _require_one_order(group: NodeGroup, shards: ParameterShards) -> None:
    """Require that equal ranges address equal entries."""
    blocks = {shards.order(fqn).column_blocks for fqn in group.fqns}
    if len(blocks) > 1:
        raise ConfigError(
            f"the parameters of {group.name} are sharded as {sorted(blocks)} blocks of columns, "
            "but a filter over layers needs one order for all; shard every layer in the same way"
        )
