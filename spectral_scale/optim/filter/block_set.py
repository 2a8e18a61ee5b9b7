"""All graphs of a filter whose nodes are blocks, on their ranks, with what they exchange."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import SpectralError
from spectral_scale.optim.filter.anchors import Anchors
from spectral_scale.optim.filter.block_filter import BlockFilter
from spectral_scale.optim.filter.measure import Sums
from spectral_scale.optim.filter.nodes import NodeGroup
from spectral_scale.optim.filter.placement import GraphPlacement, place
from spectral_scale.optim.filter.signals import BlockedSignal, Signal, StackedSignal
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.exchange import Exchange
from spectral_scale.parallel.flat_shards import ParameterShards


class BlockSet:
    """Runs each group where `place` assigns it. All ranks must call every method.

    Args:
        groups: the groups of nodes, equal on every rank.
        config: the configuration of the filter.
        shards: the backend's gradients.
        seed: fixes sampled entries and permutations.
    """

    def __init__(
        self,
        groups: Sequence[NodeGroup],
        config: FilterConfig,
        shards: ParameterShards,
        *,
        seed: int,
    ) -> None:
        self._config, self._shards, self._seed = config, shards, seed
        self._placements = place(groups, shards)
        self._blocks = [self._block_filter(p) for p in self._placements]
        self._moved = [p for p in self._placements if p.wanted is not None]
        self._exchange: Exchange | None = None
        if self._moved:
            held = [shards.ranges(fqn) for p in self._moved for fqn in p.group.fqns]
            wanted = [p.wanted or [] for p in self._moved for _ in p.group.fqns]
            self._exchange = Exchange(held, wanted, shards.group)
        self.counts_here = [p.counts_here for p in self._placements]
        """Whether no earlier rank measures the same features, for each group."""

    def _block_filter(self, placement: GraphPlacement) -> BlockFilter | None:
        """The filter of a group, or None where another rank filters it."""
        if not placement.works_here:
            return None
        first = self._shards.value(placement.group.fqns[0])
        stays = placement.wanted is None and first.numel() > 0  # where a backend offloads it
        return BlockFilter(
            placement.group,
            self._config,
            seed=self._seed,
            order=placement.order,
            span=placement.span,
            device=first.device if stays else self._shards.device,
            dtype=torch.promote_types(first.dtype, torch.float32),
        )

    def run(
        self,
        gradients: Mapping[str, Tensor],
        anchors: Anchors | None,
        sums: Sequence[Sums] | None,
        *,
        full: bool,
        needs_graph: bool,
    ) -> None:
        """Filter shards in place; no communication for groups whose nodes are here already.

        Raises SpectralError if `needs_graph` and a group has none: the filter would be off.
        """
        for index, placement in enumerate(self._placements):
            if placement.wanted is None:
                fqns = placement.group.fqns
                changes = None if anchors is None else [anchors.change(fqn) for fqn in fqns]
                tensors = [gradients[fqn] for fqn in fqns]
                self._run(index, tensors, changes, sums, full, needs_graph)
        if self._exchange is not None:
            self._run_moved(self._exchange, gradients, anchors, sums, full, needs_graph)

    def _run_moved(
        self,
        exchange: Exchange,
        gradients: Mapping[str, Tensor],
        anchors: Anchors | None,
        sums: Sequence[Sums] | None,
        full: bool,
        needs_graph: bool,
    ) -> None:
        """Filter groups whose nodes must move: one all-to-all (two with a joint loss), one back."""
        device = self._shards.device
        fqns = [fqn for p in self._moved for fqn in p.group.fqns]
        tensors = [gradients[fqn].to(device) for fqn in fqns]
        dtype = tensors[0].dtype
        here = iter(exchange.forward(tensors, dtype=dtype))
        changed: Iterator[Tensor] | None = None
        if anchors is not None:
            own = [anchors.change(fqn).to(device) for fqn in fqns]
            changed = iter(exchange.forward(own, dtype=own[0].dtype))
        filtered: list[Tensor] = []
        for index, placement in enumerate(self._placements):
            if placement.wanted is not None:
                mine = self._unfolded(placement, here)
                changes = None if changed is None else self._unfolded(placement, changed)
                self._run(index, mine, changes, sums, full, needs_graph)
                filtered += self._folded(placement, mine)
        back = exchange.backward(filtered, dtype=dtype)
        for fqn, tensor in zip(fqns, back, strict=True):
            gradients[fqn].copy_(tensor)

    def _unfolded(self, placement: GraphPlacement, tensors: Iterator[Tensor]) -> list[Tensor]:
        """The next tensors of a group; whole matrices in row-major order."""
        fqns = placement.group.fqns
        if placement.is_owned and placement.works_here:
            return [self._shards.order(fqn).to_row_major(next(tensors)) for fqn in fqns]
        return [next(tensors) for _ in fqns]

    def _folded(self, placement: GraphPlacement, tensors: list[Tensor]) -> list[Tensor]:
        """A group's filtered tensors in the order of its shards: the inverse of `_unfolded`."""
        if not (placement.is_owned and placement.works_here):
            return tensors
        orders = (self._shards.order(fqn) for fqn in placement.group.fqns)
        return [order.from_row_major(tensor) for order, tensor in zip(orders, tensors, strict=True)]

    def _run(
        self,
        index: int,
        tensors: list[Tensor],
        changes: list[Tensor] | None,
        sums: Sequence[Sums] | None,
        full: bool,
        needs_graph: bool,
    ) -> None:
        block = self._blocks[index]
        if block is None:
            return
        own = None if sums is None else sums[index]
        change = None if changes is None else _signal(block, changes)
        filtered = block.run(_signal(block, tensors), change, own, full=full)
        if needs_graph and not filtered:
            raise SpectralError(
                f"{block.group.name} has no graph, so that its filter is off; call commit() after "
                "every applied optimizer step"
            )

    def commit(self) -> None:
        """Let the latest gradients enter the means."""
        for block, _ in self._here():
            block.commit()

    def forget(self, fqns: set[str]) -> None:
        """Start the means of groups inside `fqns` again."""
        for block, _ in self._here():
            if fqns.issuperset(block.group.fqns):
                block.forget()

    def renew_graphs(self) -> None:
        """Renew all graphs: one all-reduce of the sampled mean gradients of sharded groups.

        Raises SpectralError on all ranks if the means of any group are not finite.
        """
        means = [block.mean_gradients() for block, _ in self._here()]
        sharded = []
        for mean, (_, placement) in zip(means, self._here(), strict=True):
            if placement.is_sharded:
                sharded.append(mean if placement.counts_here else mean.zero_())
        if sharded:
            flat = torch.cat([mean.flatten().to(self._shards.device) for mean in sharded])
            self._shards.group.sum(flat)
            for mean, tensor in zip(sharded, flat.split([m.numel() for m in sharded]), strict=True):
                mean.copy_(tensor.view_as(mean))
        error = None
        try:
            for mean, (block, _) in zip(means, self._here(), strict=True):
                block.renew(mean)
        except SpectralError as caught:
            error = caught
        failed = torch.tensor([float(error is not None)], device=self._shards.device)
        if float(self._shards.group.sum(failed)):
            raise error or SpectralError("another rank's graph cannot be renewed; see its error")

    def state_chunks(self, *, own: bool) -> Iterator[TensorChunk]:
        """The state of all groups: each chunk from one rank, or (`own`) all chunks on this rank."""
        for block, placement in self._here():
            if own or placement.counts_here:
                yield from block.state_chunks(own=own)

    def load_state(self, read: ReadTensor, column_blocks: Mapping[str, int]) -> None:
        """Overwrite the state from a checkpoint with these numbers of column blocks by fqn."""
        for block, _ in self._here():
            block.load_state(read, column_blocks[block.group.fqns[0]])

    @property
    def nbytes(self) -> int:
        """Bytes kept on this rank."""
        return sum(block.nbytes for block, _ in self._here())

    def _here(self) -> list[tuple[BlockFilter, GraphPlacement]]:
        pairs = zip(self._blocks, self._placements, strict=True)
        return [(block, placement) for block, placement in pairs if block is not None]


def _signal(block: BlockFilter, tensors: list[Tensor]) -> Signal:
    shape = block.group.blocks
    return StackedSignal(tensors) if shape is None else BlockedSignal(tensors[0], shape)
