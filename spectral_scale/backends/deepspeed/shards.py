"""Flat pieces of what DeepSpeed's ZeRO trains, between the last backward pass and the step."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_scale.backends.deepspeed.store import ZeroStore
from spectral_scale.parallel.flat_shards import ShardGroup
from spectral_scale.parallel.shard_geometry import FlatOrder, Range, Shape


class ZeroShards:
    """`ParameterShards` of an engine's masters and their reduced gradients.

    Creating it is not collective.

    Gradients are there from the last backward pass of a step on until `engine.step()`.
    """

    def __init__(self, store: ZeroStore) -> None:
        self._store = store
        rank, world = store.collective.rank, store.collective.world_size
        if world == 1:
            self.group = ShardGroup()
        elif store.layout.replicated:
            self.group = ShardGroup(
                writes=rank == 0,
                replica=rank,
                replica_ranks=tuple(range(world)),
                replica_handle=dist.group.WORLD,
            )
        else:
            self.group = ShardGroup(index=rank, size=world, handle=dist.group.WORLD)
        self.device = store.device
        flats = list(store.layout.flats())
        self._members = {id(f.tensor): [store.names[id(p)] for p in f.members] for f in flats}
        self._nothing = flats[0].tensor.detach().new_empty(0)
        self.shapes: Mapping[str, Shape] = {
            fqn: store.layout.shape(store.parameters[fqn])
            for fqn in store.parameters
            if fqn in store.fragments
        }

    def order(self, fqn: str) -> FlatOrder:
        """Row-major."""
        return FlatOrder(self.shapes[fqn])

    def ranges(self, fqn: str) -> list[Range]:
        """The ranges of the masters; whole where every rank keeps all of them."""
        return self._store.ranges[fqn][: self.group.size]

    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's fragment; empty where it keeps none."""
        fragment = self._store.fragments[fqn]
        if fragment is None:
            return torch.empty(0, device=self.device)
        return self._store.layout.gradient(fragment, self._store.parameters[fqn])

    def value(self, fqn: str) -> Tensor:
        """The master."""
        fragment = self._store.fragments[fqn]
        return self._nothing if fragment is None else fragment.master

    def members(self, parameter: Tensor) -> list[str]:
        """The parameters of a flat tensor."""
        return self._members[id(parameter)]

    def local_view(self, fqn: str, tensor: Tensor) -> Tensor:
        """The fragment's place in a flat tensor; empty where this rank keeps none."""
        fragment = self._store.fragments[fqn]
        return tensor.detach().view(-1)[:0] if fragment is None else fragment.of(tensor)
