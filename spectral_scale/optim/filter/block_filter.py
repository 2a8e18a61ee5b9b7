"""One graph at work: it filters its nodes' gradient in place and watches their mean gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import SpectralError
from spectral_scale.ops.graphs import Graph
from spectral_scale.optim.filter.measure import Sums
from spectral_scale.optim.filter.nodes import NodeGroup
from spectral_scale.optim.filter.operator import GraphOperator, build_graph, check_filter
from spectral_scale.optim.filter.sampling import Sample
from spectral_scale.optim.filter.signals import Signal, blocks
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.shard_geometry import FlatOrder, Range

SKETCH_ENTRIES = {"layers": 4096, "rows": 128, "heads": 1024}
"""Entries of a node's gradient whose mean is compared for knn."""


class BlockFilter:
    """Filters one group whose nodes this rank holds whole, or the same entries of all of them.

    Args:
        group: the nodes.
        config: graph, response, joint loss.
        seed: fixes sampled entries and the permutation.
        order: flat order of a node's features over all ranks.
        span: the features that this rank filters.
        device: the device of the gradients.
        dtype: float32 or float64, in which it computes.
    """

    def __init__(
        self,
        group: NodeGroup,
        config: FilterConfig,
        *,
        seed: int,
        order: FlatOrder,
        span: Range,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        check_filter(config, group.num_nodes, group.name)
        self.group, self._config, self._key = group, config, (seed, "filter", group.name)
        self._device, self._dtype = device, dtype
        self.operator: GraphOperator | None = None
        self._watches = config.graph == "knn"
        self._sample = Sample(order, span, SKETCH_ENTRIES.get(config.nodes, 1), *self._key)
        self._entries = self._sample.index.to(device)
        self._mean = torch.zeros(group.num_nodes, len(self._entries), dtype=dtype, device=device)
        self._latest: Tensor | None = None
        if not self._watches:
            self.set_graph(build_graph(config, group.num_nodes, None, *self._key))

    def set_graph(self, graph: Graph) -> None:
        """Filter over this graph from now on."""
        self.operator = GraphOperator(graph, self._config, self._device, self._dtype)

    def run(self, signal: Signal, change: Signal | None, sums: Sums | None, *, full: bool) -> bool:
        """G <- H G + 2 mu L D, in place; False if there is no graph yet.

        Args:
            signal: the gradient G.
            change: D, the parameters' change since the anchor; None without a joint loss.
            sums: adds up what happened; None: nothing is measured.
            full: whether to measure energies, too, not only norms.
        """
        if self._watches:
            self._latest = signal.sample(self._entries).to(self._dtype)
        operator = self.operator
        if operator is None:
            return False
        passive = self._config.kind in ("none", "identity") and change is None
        if passive and sums is None:
            return True
        for start, stop in blocks(signal, self._device):
            block = signal.read(start, stop)
            result = operator.filter(block)
            if sums is not None:
                _add(sums, operator, block, result, full=full)
            if change is not None:
                result = result + self._pull(operator, change.read(start, stop), sums)
            if not passive:
                signal.write(start, stop, result)
        if sums is not None and full and self.speaks:
            _add_graph(sums, operator)
        return True

    def _pull(self, operator: GraphOperator, change: Tensor, sums: Sums | None) -> Tensor:
        """2 mu L D, the gradient of the joint loss's second term."""
        curved = operator.laplacian(change.to(self._dtype))
        if sums is not None:
            sums.add("joint_loss", self._config.joint_loss_mu * _dot(change, curved))
        return curved.mul_(2.0 * self._config.joint_loss_mu)

    # -- mean gradients -----------------------------------------------------------------------

    def commit(self) -> None:
        """Let the gradient of the latest step, which was applied, enter the means."""
        if self._latest is not None:
            self._mean.lerp_(self._latest, 1.0 - self._config.gradient_decay)
        self._latest = None

    def forget(self) -> None:
        """Set the means to zero, after a swap gave the parameters another meaning."""
        self._mean.zero_()

    def mean_gradients(self) -> Tensor:
        """(n, q) float64 with this rank's columns, zeros elsewhere: the sum over ranks is whole."""
        first, total = self._sample.first, self._sample.total
        whole = self._mean.new_zeros(self.group.num_nodes, total, dtype=torch.float64)
        whole[:, first : first + self._mean.shape[1]] = self._mean
        return whole

    def renew(self, mean_gradients: Tensor) -> None:
        """Build the graph from all columns. Raises SpectralError if they are not finite."""
        try:
            graph = build_graph(self._config, self.group.num_nodes, mean_gradients, *self._key)
        except SpectralError as error:
            raise SpectralError(
                f"the mean gradients of {self.group.name} are not finite, so that its graph cannot "
                f"be renewed ({error}); lower the learning rates or look at the data, then resume "
                "from the last checkpoint"
            ) from None
        self.set_graph(graph)

    # -- state --------------------------------------------------------------------------------

    @property
    def speaks(self) -> bool:
        """True if this rank saves the state that all ranks of the group hold."""
        return self._sample.first == 0 and bool(self._mean.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes kept on this rank."""
        return self._mean.nbytes + (0 if self.operator is None else self.operator.nbytes)

    def state_chunks(self, *, own: bool) -> Iterator[TensorChunk]:
        """The graph, and this rank's columns of the mean gradients; nothing without knn."""
        if not self._watches:
            return
        prefix = f"filter/{self.group.name}"
        shape = (self.group.num_nodes, self._sample.total)
        if self._mean.numel():
            offset = (0, self._sample.first)
            yield TensorChunk(f"{prefix}/mean_gradients", self._mean, shape, offset)
        if own or self.speaks:
            table = _graph_table(None if self.operator is None else self.operator.graph)
            yield TensorChunk(f"{prefix}/graph", table, tuple(table.shape), (0, 0))

    def load_state(self, read: ReadTensor, column_blocks: int) -> None:
        """Overwrite graph and means from a checkpoint with `column_blocks` blocks of columns."""
        if not self._watches:
            return
        prefix = f"filter/{self.group.name}"
        if self._mean.numel():
            name, blocks = f"{prefix}/mean_gradients", 1 if self.group.blocks else column_blocks
            self._mean.copy_(self._sample.read(read, name, blocks, self.group.num_nodes))
        self.operator, self._latest = None, None
        table = read(f"{prefix}/graph")
        if bool(table[0, 2]):
            edges = table[1:, :2].t().long().contiguous()
            self.set_graph(Graph(self.group.num_nodes, edges, table[1:, 2].double().clone()))


def _graph_table(graph: Graph | None) -> Tensor:
    """(E + 1, 3) float64: nodes, edges and whether there is a graph; then its edges, weighted."""
    if graph is None:
        return torch.zeros(1, 3, dtype=torch.float64)
    head = torch.tensor([[graph.num_nodes, len(graph.weights), 1.0]], dtype=torch.float64)
    return torch.cat([head, torch.cat([graph.edges.double(), graph.weights[None]]).t()])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def _add(sums: Sums, operator: GraphOperator, block: Tensor, result: Tensor, *, full: bool) -> None:
    sums.add("before", _dot(block, block))
    sums.add("after", _dot(result, result))
    if full:
        sums.add("signal", _dot(block, block))
        sums.add("form", _dot(block, operator.laplacian(block)))
        if operator.basis is not None:
            sums.add_energies(operator.modes(block).double().square().sum(1))


def _add_graph(sums: Sums, operator: GraphOperator) -> None:
    """Add the graph, which every rank knows, on one rank."""
    sums.add("isolated", operator.graph.num_isolated())
    if operator.basis is not None:
        sums.set_spectrum(operator.basis.values.to(sums.flat.device))
