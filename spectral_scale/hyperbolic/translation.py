"""An encoder-decoder transformer of hyperbolic points (HyboNet's translation model).

There is no layer norm and no sum of points: a residual is added to the values from which a Lorentz
linear layer makes its points. Words, of the input and of the output, are points that are stored by
their space part.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_scale.errors import ConfigError
from spectral_scale.hyperbolic.linear import LorentzLinear
from spectral_scale.hyperbolic.points import centroid, lift, minkowski_pairs
from spectral_scale.hyperbolic.scores import PointScores

BOUND = 0.02
"""Initial weights of the linear layers, of words and of positions."""


class LorentzAttention(nn.Module):
    """Attention by minus squared distances, whose context is the centroid of the values."""

    def __init__(self, features: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            LorentzLinear(features, features, out_heads=heads, bound=BOUND) for _ in range(3)
        )
        self.output = LorentzLinear(features, features, bias=False, in_heads=heads, bound=BOUND)
        self.log_scale = nn.Parameter(torch.tensor(0.5 * math.log(features)))
        self.bias = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        """Points (batch, n, features) that look at `memory` (batch, m, features).

        Args:
            x: the queries' points, which are also the residual.
            memory: points that are looked at.
            allowed: booleans that broadcast to (batch, heads, n, m): who may look at what.
        """
        q, k, v = (
            project(points).transpose(-3, -2)
            for project, points in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        scores = (2 + 2 * minkowski_pairs(q, k)) / self.log_scale.exp() + self.bias
        weights = self.dropout(scores.masked_fill(~allowed, -math.inf).softmax(-1))
        with torch.autocast(x.device.type, enabled=False):
            context = centroid(weights @ v)
        points: Tensor = self.output(context.transpose(-3, -2), extra=x)
        return points


class LorentzBlock(nn.Module):
    """Self-attention, attention to a memory in decoders, and a feed-forward part."""

    def __init__(
        self, features: int, heads: int, ffn_features: int, *, decoder: bool, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = LorentzAttention(features, heads, dropout=dropout)
        self.cross_attention = (
            LorentzAttention(features, heads, dropout=dropout) if decoder else None
        )
        self.up = LorentzLinear(features, ffn_features, bound=BOUND)
        self.down = LorentzLinear(ffn_features, features, activation=torch.relu, bound=BOUND)

    def forward(
        self,
        x: Tensor,
        allowed: Tensor,
        memory: Tensor | None = None,
        memory_allowed: Tensor | None = None,
    ) -> Tensor:
        """Points (batch, n, features) to points; decoders need both memory arguments."""
        x = self.self_attention(x, x, allowed)
        if self.cross_attention is not None:
            x = self.cross_attention(x, memory, memory_allowed)
        points: Tensor = self.down(self.up(x), extra=x)
        return points


class WordPoints(nn.Module):
    """A point for every word of a vocabulary; its position moves it by a Lorentz linear layer."""

    parameter_roles: ClassVar[dict[str, str]] = {"points": "vector"}

    def __init__(self, vocab_size: int, features: int, max_positions: int) -> None:
        super().__init__()
        self.points = nn.Parameter(BOUND * torch.randn(vocab_size, features - 1))
        self.position = nn.Parameter(BOUND * torch.randn(max_positions, features))
        self.place = LorentzLinear(features, features, bound=BOUND)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, n) -> points (batch, n, features). Raises ConfigError beyond the positions."""
        length, longest = ids.shape[1], len(self.position)
        if length > longest:
            raise ConfigError(
                f"a sentence of {length} tokens exceeds max_positions={longest}; leave it out, or "
                "build the model with more positions"
            )
        points: Tensor = self.place(lift(self.points[ids]), extra=self.position[:length])
        return points


class LorentzTransformer(nn.Module):
    """Source tokens and the target's prefix to scores of the next token.

    Args:
        vocab_size: of source and target, which share their subwords.
        features: width of the points, with the time.
        num_layers: blocks of the encoder, and of the decoder.
        heads: points that the features are cut into for attention.
        ffn_features: width of the feed-forward points.
        max_positions: the longest sentence.
        dropout: of attention weights.
        pad_id: token that nothing looks at.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        num_layers: int = 6,
        heads: int = 4,
        ffn_features: int = 256,
        max_positions: int = 256,
        dropout: float = 0.1,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.source = WordPoints(vocab_size, features, max_positions)
        self.target = WordPoints(vocab_size, features, max_positions)
        self.encoder, self.decoder = (
            nn.ModuleList(
                LorentzBlock(features, heads, ffn_features, decoder=decoder, dropout=dropout)
                for _ in range(num_layers)
            )
            for decoder in (False, True)
        )
        self.words = PointScores(self.target.points)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Points of the source (batch, m, features), and who may be looked at (batch, 1, 1, m)."""
        allowed = (source != self.pad_id)[:, None, None, :]
        x = self.source(source)
        for block in self.encoder:
            x = block(x, allowed)
        return x, allowed

    def decode(self, target: Tensor, memory: Tensor, memory_allowed: Tensor) -> Tensor:
        """Scores (batch, n, vocab_size) of what follows each prefix of the target (batch, n)."""
        n = target.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=target.device).tril()
        x = self.target(target)
        for block in self.decoder:
            x = block(x, causal, memory, memory_allowed)
        scores: Tensor = self.words(x)
        return scores

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """`decode` of the target, after `encode` of the source."""
        return self.decode(target, *self.encode(source))
