"""Block gains: the sizes of block gradients, filtered over one graph of all blocks.

Directions stay as they are, so that blocks may differ in shape and lie in bases of their own.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import ConfigError
from spectral_scale.optim.filter.measure import Sums
from spectral_scale.optim.filter.nodes import NodeGroup
from spectral_scale.optim.filter.operator import GraphOperator, build_graph, check_filter
from spectral_scale.parallel.flat_shards import ParameterShards, is_first_holder


class GainFilter:
    """Scales each block's gradient so that the root mean squares s of all become H s.

    A gain is never negative, and 1 for a block without a gradient. One all-reduce of a number a
    block where blocks are sharded over ranks.

    Raises ConfigError for a knn graph or a joint loss, which need blocks of equal shape.
    """

    def __init__(
        self, group: NodeGroup, config: FilterConfig, shards: ParameterShards, *, seed: int
    ) -> None:
        if config.graph == "knn" or config.joint_loss_mu:
            given = "filter.graph=knn" if config.graph == "knn" else "filter.joint_loss_mu"
            raise ConfigError(
                f"{given} compares entries of blocks, which filter.nodes=block_gains does not "
                "have: its blocks may differ in shape; use filter.graph=path or nodes=layers"
            )
        check_filter(config, group.num_nodes, group.name)
        self.group = group
        graph = build_graph(config, group.num_nodes, None, seed, "filter", group.name)
        self.operator = GraphOperator(graph, config, shards.device, torch.float64)
        self._shards = shards
        self._speaks = [is_first_holder(shards, fqn) for fqn in group.fqns]
        self._sizes = torch.tensor(
            [torch.Size(shards.shapes[fqn]).numel() for fqn in group.fqns],
            dtype=torch.float64,
            device=shards.device,
        )

    def run(self, gradients: Mapping[str, Tensor], sums: Sums | None) -> None:
        """Scale the shards in place. Collective over the group of the shards."""
        tensors = [gradients[fqn] for fqn in self.group.fqns]
        squares = self._square_sums(tensors)
        sizes = (squares / self._sizes).sqrt()
        filtered = self.operator.filter(sizes[:, None])[:, 0].clamp_min(0.0)
        gains = torch.where(sizes > 0, filtered / sizes, 1.0)
        for tensor, gain in zip(tensors, gains, strict=True):
            tensor.mul_(gain.to(tensor.device, tensor.dtype))
        if sums is not None and self._shards.group.index == 0:
            self._add(sums, squares, sizes, gains)

    def _square_sums(self, tensors: Sequence[Tensor]) -> Tensor:
        """|g|^2 of each block over all ranks, float64; what several ranks hold counts once."""
        own = [
            torch.linalg.vector_norm(tensor).double().square().to(self._shards.device) * speaks
            for tensor, speaks in zip(tensors, self._speaks, strict=True)
        ]
        return self._shards.group.sum(torch.stack(own))

    def _add(self, sums: Sums, squares: Tensor, sizes: Tensor, gains: Tensor) -> None:
        column = sizes[:, None]
        sums.add("before", squares.sum())
        sums.add("after", (gains.square() * squares).sum())
        sums.add("signal", column.square().sum())
        sums.add("form", (column * self.operator.laplacian(column)).sum())
        sums.add("isolated", self.operator.graph.num_isolated())
        if self.operator.basis is not None:
            sums.add_energies(self.operator.modes(column)[:, 0].square())
            sums.set_spectrum(self.operator.basis.values.to(sizes.device))
