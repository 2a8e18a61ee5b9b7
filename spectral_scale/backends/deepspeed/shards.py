"""Flat shards of what DeepSpeed's ZeRO trains: masters, reduced gradients and moments."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectral_scale.backends.deepspeed.partitions import Fragment, Layout
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.flat_shards import ParameterShards, ShardGroup
from spectral_scale.parallel.shard_geometry import FlatOrder, Range, Shape
from spectral_scale.parallel.store import MOMENTS


class ZeroShards(ParameterShards):
    """Shards of an engine's masters. Creating it is collective.

    Gradients are there from the last backward pass of a step on until `engine.step()`.

    Args:
        layout: where the engine keeps what.
        inner: the optimizer that steps the masters; its state must have been created.
        parameters: all of the module, by fqn.
        collective: all ranks of the engine.
        device: of the engine.
    """

    def __init__(
        self,
        layout: Layout,
        inner: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        collective: Collective,
        device: torch.device,
    ) -> None:
        self._layout, self._inner, self._parameters = layout, inner, parameters
        self.device = device
        self.group = ShardGroup(shards=collective)
        if layout.replicated:
            self.group = ShardGroup(replicas=collective)
        self.names = {id(parameter): fqn for fqn, parameter in parameters.items()}
        flats = list(layout.flats())
        self._members = {id(f.tensor): [self.names[id(p)] for p in f.members] for f in flats}
        self._nothing = flats[0].tensor.detach().new_empty(0)
        trained = {fqn for members in self._members.values() for fqn in members}
        self.fragments: dict[str, Fragment | None] = {
            fqn: layout.fragment(fqn, parameter)
            for fqn, parameter in parameters.items()
            if fqn in trained
        }
        """What this rank keeps of each trained parameter, if anything."""
        self.shapes: Mapping[str, Shape] = {
            fqn: layout.shape(parameters[fqn]) for fqn in self.fragments
        }
        mine = {n: (0, 0) if f is None else (f.start, f.numel) for n, f in self.fragments.items()}
        ranks = collective.broadcast_json(collective.gather_json(mine))
        self._ranges = {fqn: [tuple(rank[fqn]) for rank in ranks] for fqn in mine}

    def order(self, fqn: str) -> FlatOrder:
        """The order of a parameter's elements, which is row-major for every parameter."""
        return FlatOrder(self.shapes[fqn])

    def ranges(self, fqn: str) -> list[Range]:
        """The ranges of the masters; whole where every rank keeps all of them."""
        return self._ranges[fqn][: self.group.size]

    def gradient(self, fqn: str) -> Tensor | None:
        """The reduced gradient of this rank's fragment; empty where it keeps none."""
        fragment = self.fragments[fqn]
        if fragment is None:
            return torch.empty(0, device=self.device)
        return self._layout.gradient(fragment, self._parameters[fqn])

    def value(self, fqn: str) -> Tensor:
        """The master; empty where this rank keeps none."""
        fragment = self.fragments[fqn]
        return self._nothing if fragment is None else fragment.master

    def moments(self, fqn: str) -> Mapping[str, Tensor]:
        """Moments of the master, by name; empty where this rank keeps no master, or where
        the owners of a method's matrices keep them."""
        fragment = self.fragments[fqn]
        if fragment is None:
            return {}
        state = self._inner.state[fragment.flat]
        return {key: fragment.of(state[key]) for key in MOMENTS if key in state}

    def step_counts(self) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """Adam's step count of each flat tensor, and the parameters in it, which share it."""
        for flat in self._layout.flats():
            yield self._inner.state[flat.tensor]["step"], self.members(flat.tensor)

    def members(self, parameter: Tensor) -> list[str]:
        """The parameters of a flat tensor."""
        return self._members[id(parameter)]

    def local_view(self, fqn: str, tensor: Tensor) -> Tensor:
        """The fragment's place in a flat tensor; empty where this rank keeps none."""
        fragment = self.fragments[fqn]
        return tensor.detach().view(-1)[:0] if fragment is None else fragment.of(tensor)
