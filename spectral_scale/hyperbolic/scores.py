"""Scores of a finite choice, classes or words: one point of the hyperboloid for each."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_scale.hyperbolic.points import lift, minkowski_pairs


class PointScores(nn.Module):
    """The score of a choice is minus the squared distance to its point, plus its bias.

    Points are stored by their space part, so that AdamW trains them as it trains a vector: no
    Riemannian optimizer is needed, and they do not decay.

    Args:
        space: initial space parts (choices, features - 1), which are copied.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"points": "vector"}

    def __init__(self, space: Tensor) -> None:
        super().__init__()
        self.points = nn.Parameter(space.detach().clone())
        self.bias = nn.Parameter(torch.zeros(len(space), dtype=space.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Points (..., features) -> scores (..., choices)."""
        return 2 + 2 * minkowski_pairs(x, lift(self.points)) + self.bias
