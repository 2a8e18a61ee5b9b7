"""Flat pieces of what DeepSpeed's ZeRO trains, between the last backward pass and the step."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_scale.backends.zero_store import ZeroStore
from spectral_scale.parallel.pieces import Range, ShardGroup
from spectral_scale.parallel.rectangles import Shape


class ZeroPieces:
    """`Pieces` of an engine's masters and their reduced gradients. Creating it is not collective.

    Gradients are there from the last backward pass of a step on until `engine.step()`.
    """

    def __init__(self, store: ZeroStore) -> None:
        self._store = store
        rank, world = store.collective.rank, store.collective.world_size
        if store.layout.replicated or world == 1:
            self.group = ShardGroup(writes=rank == 0)
        else:
            self.group = ShardGroup(index=rank, size=world, handle=dist.group.WORLD)
        self.device = store.device
        self.shapes: Mapping[str, Shape] = {
            fqn: store.layout.shape(store.parameters[fqn])
            for fqn in store.parameters
            if fqn in store.fragments
        }

    def held(self, fqn: str) -> list[Range]:
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
        return torch.empty(0, device=self.device) if fragment is None else fragment.master
