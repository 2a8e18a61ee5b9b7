"""Weighted undirected graphs over parameter blocks, as symmetric edge lists."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError, SpectralError

ROWS_AT_ONCE = 1024
"""Rows of the matrix of cosines that exist at a time."""


@dataclass(frozen=True)
class Graph:
    """Nodes 0 .. num_nodes - 1 and weighted edges between different ones; on the CPU."""

    num_nodes: int
    """Nodes, those without an edge included."""
    edges: Tensor
    """(2, E) int64: both directions of every edge, ordered by first and second node."""
    weights: Tensor
    """(E,) float64, above 0, the same in both directions."""

    def degrees(self) -> Tensor:
        """Sum of the weights at each node, (num_nodes,) float64."""
        zeros = torch.zeros(self.num_nodes, dtype=torch.float64)
        return zeros.index_add_(0, self.edges[0], self.weights)

    def num_isolated(self) -> int:
        """Number of nodes without an edge, which every filter leaves unchanged."""
        return int((self.degrees() == 0).sum())

    def adjacency(self) -> Tensor:
        """The dense matrix A (num_nodes, num_nodes) float64, zero on the diagonal."""
        dense = torch.zeros(self.num_nodes, self.num_nodes, dtype=torch.float64)
        dense[self.edges[0], self.edges[1]] = self.weights
        return dense


def path_graph(num_nodes: int) -> Graph:
    """Each node joined to the next, weight 1: layers by depth, rows as stored."""
    left = torch.arange(num_nodes - 1)
    return _symmetric(num_nodes, left, left + 1, torch.ones(num_nodes - 1, dtype=torch.float64))


def ring_graph(num_nodes: int) -> Graph:
    """A path whose ends are joined: the graph of Laplacian smoothing (Osher et al., 1806.06317)."""
    left = torch.arange(num_nodes)
    return _symmetric(num_nodes, left, (left + 1) % num_nodes, torch.ones(num_nodes).double())


def complete_graph(num_nodes: int) -> Graph:
    """All nodes joined, weight 1: its filters pull every node toward the mean, a control."""
    left, right = torch.triu_indices(num_nodes, num_nodes, offset=1)
    return _symmetric(num_nodes, left, right, torch.ones(len(left), dtype=torch.float64))


def knn_graph(features: Tensor, neighbors: int) -> Graph:
    """Each node joined to the nodes of most similar direction; an edge if either end chose it.

    The weight of an edge is the cosine of its ends' features. Only positive cosines make an edge,
    so that a node that resembles no other has none.

    Args:
        features: (num_nodes, q), any floating dtype and device; one row a node.
        neighbors: most similar nodes that each node chooses; all of them if there are fewer.

    Raises:
        ConfigError: `neighbors` below 1.
        SpectralError: features that are not finite.
    """
    if neighbors < 1:
        raise ConfigError(f"neighbors={neighbors} must be at least 1")
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite()).any(1).nonzero()[0])
        raise SpectralError(f"the features of node {bad} are not finite; no graph can be built")
    num_nodes = features.shape[0]
    unit = torch.nn.functional.normalize(features.double().cpu(), dim=1)
    chosen = min(neighbors, num_nodes - 1)
    starts, ends, cosines = [], [], []
    for first in range(0, num_nodes, ROWS_AT_ONCE):
        rows = torch.arange(first, min(first + ROWS_AT_ONCE, num_nodes))
        block = unit[rows] @ unit.t()
        block[torch.arange(len(rows)), rows] = -torch.inf
        top = block.topk(chosen, dim=1)
        starts.append(rows.repeat_interleave(chosen))
        ends.append(top.indices.flatten())
        cosines.append(top.values.flatten())
    start, end, cosine = torch.cat(starts), torch.cat(ends), torch.cat(cosines)
    positive = cosine > 0
    return _symmetric(num_nodes, start[positive], end[positive], cosine[positive])


def permuted(graph: Graph, permutation: Tensor) -> Graph:
    """Node i becomes node `permutation[i]`: the same spectrum, no relation to the parameters."""
    start, end = permutation[graph.edges[0]], permutation[graph.edges[1]]
    return _symmetric(graph.num_nodes, start, end, graph.weights)


def _symmetric(num_nodes: int, start: Tensor, end: Tensor, weights: Tensor) -> Graph:
    """Symmetric edges: each pair once per direction, with the largest weight given for it."""
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    key, place = torch.unique(low * num_nodes + high, return_inverse=True)
    weight = torch.zeros(len(key), dtype=torch.float64)
    weight.scatter_reduce_(0, place, weights, "amax")
    low, high = key // num_nodes, key % num_nodes
    both = torch.cat([torch.stack([low, high]), torch.stack([high, low])], dim=1)
    order = (both[0] * num_nodes + both[1]).argsort()
    return Graph(num_nodes, both[:, order], torch.cat([weight, weight])[order])
