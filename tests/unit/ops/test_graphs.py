"""Graphs over blocks: what is joined, with which weight, and that both directions agree."""

import pytest
import torch

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.ops import graphs
from spectral_scale.ops.graphs import Graph, complete_graph, knn_graph, path_graph, permuted


def pairs(graph: Graph) -> set[tuple[int, int]]:
    return {(i, j) for i, j in graph.edges.t().tolist() if i < j}


def assert_symmetric(graph: Graph) -> None:
    adjacency = graph.adjacency()
    assert torch.equal(adjacency, adjacency.t())
    assert not adjacency.diagonal().any()
    assert bool((graph.weights > 0).all())
    order = graph.edges[0] * graph.num_nodes + graph.edges[1]
    assert bool((order.diff() > 0).all())  # sorted, none twice


def test_path_and_complete() -> None:
    assert pairs(path_graph(4)) == {(0, 1), (1, 2), (2, 3)}
    assert len(pairs(complete_graph(5))) == 10
    assert path_graph(1).edges.shape == (2, 0)
    for graph in (path_graph(4), complete_graph(5)):
        assert_symmetric(graph)


def test_neighbors_are_the_most_similar_ones() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 1.5, 1.6])
    graph = knn_graph(torch.stack([angles.cos(), angles.sin()], dim=1), 1)
    assert pairs(graph) == {(0, 1), (1, 2), (3, 4)}
    weight = graph.adjacency()[1, 2]
    assert float(weight) == pytest.approx(float(torch.tensor(0.2).cos()), abs=1e-6)
    assert_symmetric(graph)


def test_blocks_of_rows_give_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    whole = knn_graph(features, 4)
    assert_symmetric(whole)
    monkeypatch.setattr(graphs, "ROWS_AT_ONCE", 8)
    cut = knn_graph(features, 4)
    assert torch.equal(cut.edges, whole.edges)
    assert torch.allclose(cut.weights, whole.weights, atol=1e-14)


def test_scale_of_a_node_does_not_matter() -> None:
    features = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    scaled = features * torch.logspace(-3, 3, 20)[:, None]
    assert torch.equal(knn_graph(features, 3).edges, knn_graph(scaled, 3).edges)


def test_opposite_and_silent_nodes_are_isolated() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [0.0, 0.0]])
    graph = knn_graph(features, 2)
    assert pairs(graph) == {(0, 1)}
    assert graph.num_isolated() == 2


def test_permutation_relabels_nodes() -> None:
    graph = permuted(path_graph(4), torch.tensor([2, 0, 3, 1]))
    assert pairs(graph) == {(0, 2), (0, 3), (1, 3)}
    assert_symmetric(graph)


def test_features_that_are_not_finite_are_refused() -> None:
    features = torch.ones(3, 2)
    features[1, 0] = float("nan")
    with pytest.raises(SpectralError, match="node 1 are not finite"):
        knn_graph(features, 1)
    with pytest.raises(ConfigError, match="neighbors=0"):
        knn_graph(torch.ones(3, 2), 0)
