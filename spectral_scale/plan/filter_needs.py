"""Memory and traffic of the spectral filter: formulas, not measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from spectral_scale.config.capability import shard_group_size, zero_stage
from spectral_scale.config.schema import RunConfig
from spectral_scale.optim.filter.block_filter import SKETCH_ENTRIES
from spectral_scale.optim.filter.nodes import Member, NodeGroup, plan_groups
from spectral_scale.optim.filter.operator import EXACT_NODES
from spectral_scale.optim.filter.placement import owners_by_size
from spectral_scale.optim.filter.sampling import DRIFT_ENTRIES
from spectral_scale.parallel.tensor_parallel_table import sharded_dimension
from spectral_scale.plan.activations import master_itemsize
from spectral_scale.plan.inventory import Inventory


@dataclass(frozen=True, kw_only=True)
class FilterNeeds:
    """Bytes on the fullest rank, and bytes of a rank's messages."""

    kept: int = 0
    """Graphs, sampled means and values, and the anchors of a joint loss."""
    workspace: int = 0
    """Buffers of an exchange, or of the change since the anchors, while the filter runs."""
    saved: int = 0
    """Bytes in a checkpoint, all ranks together."""
    exchanged: int = 0
    """Bytes that a rank sends in all-to-alls of an optimizer step, at most: graphs that lie on one
    rank stay there."""
    reduced: int = 0
    """Bytes that a rank sends in all-reduces of an optimizer step that is not measured."""


@dataclass(frozen=True, kw_only=True)
class _Sharding:
    """How a backend shards what the filter reaches."""

    ranks: int
    """Ranks over which the model is sharded."""
    aligned: bool
    """True if a rank holds the same entries of every layer."""
    tensor_parallel: int = 1
    """Tensor-parallel ranks among them, which all hold what tensor parallelism leaves whole."""

    def num_shards(self, fqn: str) -> int:
        """Ranks over which a parameter and its gradient are sharded."""
        whole = self.tensor_parallel > 1 and sharded_dimension(fqn) is None
        return self.ranks // self.tensor_parallel if whole else self.ranks


def filter_needs(config: RunConfig, inventory: Inventory, *, world_size: int) -> FilterNeeds:
    """The needs of the run's filter; nothing if it has none. Raises ConfigError if nothing can be
    filtered as configured."""
    settings = config.filter
    if not settings.enabled:
        return FilterNeeds()
    members = {i.fqn: Member(i.shape, i.role) for i in inventory.items if i.trainable}
    groups = plan_groups(members, settings, head_size=inventory.architecture.head_size)
    numels = {fqn: prod(members[fqn].shape) for group in groups for fqn in group.fqns}
    itemsize = master_itemsize(config)
    # Of each parameter: sampled entries, from which its drift is estimated, and its whole anchor if
    # there is a joint loss.
    kept_by_name = {
        fqn: itemsize * (min(n, DRIFT_ENTRIES) + (n if settings.joint_loss_mu else 0))
        for fqn, n in numels.items()
    }
    sharding = _sharding_of(config, world_size)
    state = sum(_share(size, sharding.num_shards(fqn)) for fqn, size in kept_by_name.items())
    of_shards = sum(kept_by_name.values())
    if settings.nodes == "block_gains":
        reduced = round(2 * 8 * len(numels) * (sharding.ranks - 1) / sharding.ranks)
        return FilterNeeds(kept=state, saved=of_shards, reduced=reduced)
    means = [itemsize * _sampled(group, settings.nodes, numels) for group in groups]
    graphs = [_graph_bytes(config, group.num_nodes, itemsize) for group in groups]
    saved = of_shards + (sum(means) if settings.graph == "knn" else 0)
    if sharding.ranks == 1 or settings.nodes == "layers":
        shares = (
            _share(m, sharding.num_shards(g.fqns[0])) for m, g in zip(means, groups, strict=True)
        )
        kept = state + sum(graphs) + sum(shares)
    else:
        both = [mean + graph for mean, graph in zip(means, graphs, strict=True)]
        kept = state + _fullest(groups, numels, both, sharding.ranks)
    # Nodes that are layers need no exchange where a rank has the same entries of each; nodes inside
    # a sharded matrix need it whole on one rank.
    moved = sharding.ranks > 1 and not (settings.nodes == "layers" and sharding.aligned)
    workspace = (
        itemsize * _largest_change(groups, numels, sharding) if settings.joint_loss_mu else 0
    )
    exchanged = 0
    if moved:
        held = sum(_share(n, sharding.num_shards(fqn)) for fqn, n in numels.items())
        wanted = 0
        if settings.nodes != "layers":
            whole = [numels[group.fqns[0]] for group in groups]
            wanted = _fullest(groups, numels, whole, sharding.ranks)
        extra = 1 if settings.joint_loss_mu else 0
        workspace = (4 + extra) * itemsize * max(held, wanted)
        exchanged = round((2 + extra) * itemsize * held * (sharding.ranks - 1) / sharding.ranks)
    return FilterNeeds(kept=kept, workspace=workspace, saved=saved, exchanged=exchanged)


def _sharding_of(config: RunConfig, world_size: int) -> _Sharding:
    tensor_parallel = config.parallel.tensor_parallel
    if config.parallel.backend == "fsdp2":
        ranks = shard_group_size(config.parallel, world_size)
        return _Sharding(ranks=ranks, aligned=True, tensor_parallel=tensor_parallel)
    if config.parallel.backend == "megatron":
        sharded = config.parallel.distributed_optimizer and world_size > tensor_parallel
        return _Sharding(
            ranks=world_size if sharded else tensor_parallel,
            aligned=not sharded,
            tensor_parallel=tensor_parallel,
        )
    if config.parallel.backend == "deepspeed" and (stage := zero_stage(config.parallel)):
        return _Sharding(ranks=world_size, aligned=stage == 3)
    return _Sharding(ranks=1, aligned=True)


def _sampled(group: NodeGroup, nodes: str, numels: dict[str, int]) -> int:
    """Entries of the mean gradients of all nodes."""
    first = numels[group.fqns[0]]
    features = first if group.blocks is None else first // group.num_nodes
    return group.num_nodes * min(features, SKETCH_ENTRIES[nodes])


def _graph_bytes(config: RunConfig, nodes: int, itemsize: int) -> int:
    """Bytes of the Laplacian and of the filter matrices, dense or one more sparse one."""
    passive = config.filter.kind in ("identity", "none")
    if nodes <= EXACT_NODES:
        return itemsize * nodes * nodes * (2 if passive else 3)
    neighbours = 2 * config.filter.neighbors if config.filter.graph == "knn" else 2
    sparse = (itemsize + 8) * nodes * (neighbours + 1) + 8 * (nodes + 1)
    return sparse * (1 if passive else 2)


def _fullest(
    groups: Sequence[NodeGroup], numels: dict[str, int], sizes: Sequence[int], ranks: int
) -> int:
    """The largest sum of a rank's matrices' sizes, dealt out as the filter does."""
    owners = owners_by_size([numels[group.fqns[0]] for group in groups], ranks)
    found = [0] * ranks
    for owner, size in zip(owners, sizes, strict=True):
        found[owner] += size
    return max(found)


def _largest_change(
    groups: Sequence[NodeGroup], numels: dict[str, int], sharding: _Sharding
) -> int:
    """Elements of the largest group that a rank holds."""
    return max(sum(_share(numels[fqn], sharding.num_shards(fqn)) for fqn in g.fqns) for g in groups)


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)
