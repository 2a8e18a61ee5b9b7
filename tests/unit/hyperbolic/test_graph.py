"""Graph layers, class points and the losses of both tasks."""

import torch
from torch import Tensor

from spectral_scale import param_groups
from spectral_scale.hyperbolic import (
    ClassPoints,
    LorentzGraphLayer,
    exp_at_origin,
    lift,
    link_loss,
    link_scores,
    minkowski,
    node_loss,
)


def points(count: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return exp_at_origin(torch.randn(count, features - 1, generator=generator))


def test_a_node_becomes_the_centroid_of_its_neighbours() -> None:
    torch.manual_seed(0)
    layer, x = LorentzGraphLayer(5, 4), points(3, 5)
    adjacency = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    y = layer(x, adjacency.to_sparse())
    torch.testing.assert_close(minkowski(y, y), -torch.ones(3, 1), rtol=1e-3, atol=1e-3)
    alone = layer.transform(x)
    torch.testing.assert_close(y[1], alone[1], rtol=1e-4, atol=1e-4)
    assert (y[0] - alone[0]).abs().max() > 1e-2  # the twin: a node with a neighbour moves


def test_scores_are_minus_squared_distances() -> None:
    torch.manual_seed(0)
    head, x = ClassPoints(3, 5), points(4, 5)
    centres = lift(head.points)
    apart = x[:, None, :] - centres[None]
    torch.testing.assert_close(head(x), -minkowski(apart, apart).squeeze(-1), rtol=1e-4, atol=1e-4)
    pairs = torch.tensor([[0, 1], [2, 2]])
    assert abs(float(link_scores(x, pairs)[1])) < 1e-3  # a node and itself are at distance 0
    assert float(link_scores(x, pairs)[0]) < 0


def test_class_points_neither_decay_nor_count_as_a_matrix() -> None:
    groups = param_groups(ClassPoints(3, 5), lr=0.1, spectral_lr=0.1, weight_decay=0.5)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("dense_no_decay", 0.0)]


def test_losses_by_hand() -> None:
    scores, labels = torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([0, 0])
    # node 0: 1 and relu(1 - 1 - 1) = 0; node 1: 1 and relu(1 - 0 + 2) = 3
    assert float(node_loss(scores, labels, margin=1.0)) == (1 + 0 + 1 + 3) / 4
    positive, negative = torch.tensor([0.0, -1.0]), torch.tensor([-3.0, -1.5])
    # 2 and 2 for the links themselves; relu(2 - 0 - 3) = 0 and relu(2 + 1 - 1.5) = 1.5
    assert float(link_loss(positive, negative, margin=2.0)) == (2 + 2 + 0 + 1.5) / 4
