"""Graph networks of hyperbolic points, and the losses of their two tasks (HyboNet's code)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectral_scale.hyperbolic.linear import LorentzLinear
from spectral_scale.hyperbolic.points import centroid, exp_at_origin, minkowski
from spectral_scale.hyperbolic.scores import PointScores


class LorentzGraphLayer(nn.Module):
    """A Lorentz linear layer, then the centroid of each node's neighbours.

    Args:
        in_features, out_features: widths with the time.
        dropout, activation: of the linear layer's input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.transform = LorentzLinear(
            in_features, out_features, dropout=dropout, activation=activation
        )

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(nodes, in) -> (nodes, out); `adjacency` is sparse, its rows sum to 1."""
        x = self.transform(x)
        with torch.autocast(x.device.type, enabled=False):
            return centroid(torch.sparse.mm(adjacency, x))


class ClassPoints(PointScores):
    """One point for each class, at a distance of up to 1 from the origin at first."""

    def __init__(self, classes: int, features: int) -> None:
        start = torch.nn.functional.normalize(torch.randn(classes, features), dim=-1)
        super().__init__(exp_at_origin(start[:, 1:])[:, 1:])


def node_loss(scores: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    """Mean over nodes and classes of relu(margin - score of the label + score of the class).

    The label's own term is the margin, without a gradient.
    """
    own = scores.gather(1, labels[:, None])
    return (margin - own + scores).relu().mean()


def link_scores(x: Tensor, pairs: Tensor) -> Tensor:
    """Minus the squared distance of each pair of nodes: (n, features), (p, 2) -> (p,)."""
    return (2 + 2 * minkowski(x[pairs[:, 0]], x[pairs[:, 1]])).squeeze(-1)


def link_loss(positive: Tensor, negative: Tensor, *, margin: float) -> Tensor:
    """Mean over links and as many drawn pairs of relu(margin - score of the link + other score).

    Half of the terms compare a link with itself and are the margin, without a gradient.
    """
    return ((margin - positive + negative).relu().mean() + margin) / 2
