"""Flat shards of what Megatron's optimizers step: values, reduced gradients and moments.

With two tensor-parallel ranks (t) and two data-parallel ranks (d), a column-parallel weight of
4 x 3 has its rows 0-1 on t0 and its rows 2-3 on t1, elements 0-5 and 6-11 of the flattened weight.
What a rank's optimizer steps are these ranges, as (first element, elements):

    rank                      t0 d0     t1 d0     t0 d1     t1 d1
    FP32Optimizer             (0, 6)    (6, 6)    (0, 6)    (6, 6)     d0 and d1 are replicas
    DistributedOptimizer      (0, 4)    (6, 4)    (4, 2)    (10, 2)    one group of four ranks

The DistributedOptimizer flattens a rank's local weights into buckets and splits each of them, so
that its boundary between d0 and d1 may lie anywhere, here after 4 elements. A row-parallel weight
is sharded along its columns; it is flattened by blocks of columns (`FlatOrder`), so that t0's
columns are one range as well.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_scale.backends.megatron.optimizer import Masters
from spectral_scale.backends.megatron.partitioning import flat_place
from spectral_scale.parallel.collective import ProcessGroup
from spectral_scale.parallel.flat_shards import ParameterShards, ShardGroup
from spectral_scale.parallel.shard_geometry import FlatOrder, Range, Shape
from spectral_scale.parallel.store import MOMENTS
from spectral_scale.parallel.table import ParameterTable


class MegatronShards(ParameterShards):
    """Shards of a model over tensor- and data-parallel ranks. Creating it is collective.

    The DistributedOptimizer steps a flat range of a rank's local parameter; the group is then all
    ranks. Without it, data-parallel ranks are replicas, and the group is the tensor-parallel one.

    Args:
        parameters: this rank's local parameters by fqn; what does not train is left out.
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
        self.group = _group(tensor, data, self.device, sharded=masters.sharded)
        self.steps_everywhere = not masters.sharded
        mine = {fqn: self._range(fqn) for fqn in self._parameters}
        ranks = self.group.shards.broadcast_json(self.group.shards.gather_json(mine))
        self._ranges = {fqn: [tuple(rank[fqn]) for rank in ranks] for fqn in mine}

    def order(self, fqn: str) -> FlatOrder:
        """The order of a parameter's elements: by blocks of columns where columns are sharded."""
        return self._places[fqn][0]

    def ranges(self, fqn: str) -> list[Range]:
        """For each rank, the range of a parameter that its optimizer steps."""
        return self._ranges[fqn]

    def local_range(self, fqn: str) -> Range:
        """This rank's local parameter, whichever of its elements the optimizer here steps."""
        return self._places[fqn][1], self._parameters[fqn].numel()

    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's range; empty where others step all of it."""
        found = self._masters.stepped(self._parameters[fqn])
        if found is None:
            return torch.empty(0, device=self.device)
        return None if found[0].grad is None else found[0].grad.view(-1)

    def value(self, fqn: str) -> Tensor:
        """The elements that this rank's optimizer steps, 1-D; empty if it steps none of them."""
        found = self._masters.stepped(self._parameters[fqn])
        if found is None:
            return torch.empty(0, device=self.device)
        return found[0].detach().view(-1)

    def moments(self, fqn: str) -> Mapping[str, Tensor]:
        """Moments of the range that this rank steps, by name; without elements where other ranks
        step it, so that all ranks list the same names."""
        found = self._masters.stepped(self._parameters[fqn])
        if found is None:
            return {key: torch.empty(0, device=self.device) for key in MOMENTS}
        return {key: found[2][key].view(-1) for key in MOMENTS}

    def step_counts(self) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """Adam's step count of each parameter of which this rank steps anything, with its name."""
        for fqn, parameter in self._parameters.items():
            found = self._masters.stepped(parameter)
            if found is not None:
                yield found[2]["step"], [fqn]

    def _range(self, fqn: str) -> Range:
        """What this rank's optimizer steps, in the flat order of the whole parameter."""
        found = self._masters.stepped(self._parameters[fqn])
        return (0, 0) if found is None else (self._places[fqn][1] + found[1], found[0].numel())


def _group(
    tensor: dist.ProcessGroup, data: dist.ProcessGroup, device: torch.device, *, sharded: bool
) -> ShardGroup:
    if sharded:
        return ShardGroup(shards=ProcessGroup(device))
    return ShardGroup(shards=ProcessGroup(device, tensor), replicas=ProcessGroup(device, data))
