"""A linear layer between points of the hyperboloid (Chen et al. 2022, HyboNet's code)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectral_scale.errors import ConfigError
from spectral_scale.hyperbolic.points import LEAST_SQUARE, at_least_float32

LEAST_TIME = 1.1
"""The time that outputs exceed; it keeps them away from the origin, whose direction is none."""
INITIAL_REACH = 10.0
"""Time that the sigmoid can add at first."""


class LorentzLinear(nn.Module):
    """z = W x + b; time = e^s sigmoid(z_0) + 1.1; space = z_1.. stretched to sqrt(time^2 - 1).

    W, the time's row and column included, is `linear`, an ordinary `nn.Linear`: `convert` factors
    it as a whole, and what follows is the same for every method. Rows 1.. of W and b can be scaled
    together without any change of the output: only their direction counts.

    Args:
        in_features, out_features: widths with the time, of all heads together.
        bias: whether z has one.
        dropout: probability with which coordinates of the input are zeroed.
        activation: applied to all coordinates of the input.
        in_heads: points that the input concatenates; they are given as (..., in_heads, width).
        out_heads: points that z is cut into; they are returned as (..., out_heads, width).
        bound: initial weights are uniform in +-bound; None: 1 / sqrt(out_features). The columns of
            the inputs' times start at zero.

    Raises ConfigError if heads do not divide a width, or a point would have no space.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        in_heads: int = 1,
        out_heads: int = 1,
        bound: float | None = None,
    ) -> None:
        super().__init__()
        for width, heads in ((in_features, in_heads), (out_features, out_heads)):
            if width % heads or width // heads < 2:
                raise ConfigError(
                    f"{width} features cannot be {heads} points, which need a time and at least "
                    "one coordinate of space each; change the width or the number of heads"
                )
        self.dropout, self.activation = dropout, activation
        self.in_heads, self.out_heads = in_heads, out_heads
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.log_reach = nn.Parameter(torch.tensor(math.log(INITIAL_REACH)))
        self._initialise(1 / math.sqrt(out_features) if bound is None else bound)

    @torch.no_grad()
    def _initialise(self, bound: float) -> None:
        nn.init.uniform_(self.linear.weight, -bound, bound)
        self.linear.weight[:, :: self.linear.in_features // self.in_heads] = 0
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Points to points; `extra` (..., out_features) is added to z, as a residual is."""
        if self.in_heads > 1:
            x = x.flatten(-2)
        x = x if self.activation is None else self.activation(x)
        z = at_least_float32(self.linear(F.dropout(x, self.dropout, self.training)))
        z = z if extra is None else z + extra
        return self.to_points(z.unflatten(-1, (self.out_heads, -1)) if self.out_heads > 1 else z)

    def to_points(self, z: Tensor) -> Tensor:
        """The points that values z = (z_0, z_1..) stand for."""
        time = self.log_reach.exp() * z[..., :1].sigmoid() + LEAST_TIME
        space = z[..., 1:]
        square = space.square().sum(-1, keepdim=True).clamp_min(LEAST_SQUARE)
        return torch.cat([time, space * ((time.square() - 1) / square).sqrt()], -1)
