"""Flat pieces of what Megatron's optimizers step, between the last backward pass and the step."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_scale.backends.megatron.optimizer import Masters
from spectral_scale.backends.megatron.partitioning import flat_place
from spectral_scale.parallel.flat_shards import ShardGroup
from spectral_scale.parallel.shard_geometry import FlatOrder, Range, Shape
from spectral_scale.parallel.table import ParameterTable


class MegatronShards:
    """`ParameterShards` of a model over tensor- and data-parallel ranks. Creating it is collective.

    The DistributedOptimizer steps a flat range of each rank's part of a parameter; the group is
    then all ranks. Without it, the data-parallel copies of a tensor-parallel group hold the same.

    Args:
        parameters: this rank's parts by logical name; what does not train is left out.
        table: their whole shapes.
        masters: what is stepped.
        tensor: the tensor-parallel group.
        data: the data-parallel group.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        table: ParameterTable,
        masters: Masters,
        tensor: dist.ProcessGroup,
        data: dist.ProcessGroup,
    ) -> None:
        self._masters = masters
        self._parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        self.shapes: Mapping[str, Shape] = {n: table[n].global_shape for n in self._parameters}
        self.device = next(iter(self._parameters.values())).device
        self._places = {
            fqn: flat_place(parameter, self.shapes[fqn], tensor)
            for fqn, parameter in self._parameters.items()
        }
        self.group = _group(tensor, data, sharded=masters.sharded)
        mine = [self._range(fqn) for fqn in self._parameters]
        self._ranges = dict(zip(self._parameters, self._of_all_ranks(mine), strict=True))

    def order(self, fqn: str) -> FlatOrder:
        """By blocks of columns where tensor parallelism cuts columns."""
        return self._places[fqn][0]

    def ranges(self, fqn: str) -> list[Range]:
        """What each rank's optimizer steps."""
        return self._ranges[fqn]

    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's range; empty where others step all of it."""
        found = self._masters.held(self._parameters[fqn])
        if found is None:
            return torch.empty(0, device=self.device)
        return None if found[0].grad is None else found[0].grad.view(-1)

    def value(self, fqn: str) -> Tensor:
        """What is stepped."""
        found = self._masters.held(self._parameters[fqn])
        if found is None:
            return torch.empty(0, device=self.device)
        return found[0].detach().view(-1)

    def _range(self, fqn: str) -> Range:
        """This rank's, in the order of the whole parameter."""
        found = self._masters.held(self._parameters[fqn])
        return (0, 0) if found is None else (self._places[fqn][1] + found[1], found[0].numel())

    def _of_all_ranks(self, mine: list[Range]) -> list[list[Range]]:
        """[parameter][rank of the group] -> range: a few numbers, gathered once."""
        if self.group.size == 1:
            return [[range_] for range_ in mine]
        own = torch.tensor(mine, dtype=torch.int64, device=self.device)
        ranks = [torch.empty_like(own) for _ in range(self.group.size)]
        dist.all_gather(ranks, own, group=self.group.handle)
        table = [rank.tolist() for rank in ranks]
        return [[(a, n) for a, n in (rank[i] for rank in table)] for i in range(len(mine))]


def _group(tensor: dist.ProcessGroup, data: dist.ProcessGroup, *, sharded: bool) -> ShardGroup:
    if sharded:
        everyone = dist.group.WORLD
        return ShardGroup(index=dist.get_rank(), size=dist.get_world_size(), handle=everyone)
    return ShardGroup(
        index=tensor.rank(),
        size=tensor.size(),
        handle=tensor,
        writes=data.rank() == 0,
        replica=data.rank(),
        replica_ranks=tuple(dist.get_process_group_ranks(data)),
        replica_handle=data,
    )
