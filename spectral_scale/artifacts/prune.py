"""Prunes a trained model's matrices to their largest singular values (SST's paper, pruning).

Each matrix becomes its best approximation of the kept rank (Eckart and Young 1936); it stays
dense, so that only the size it would have if stored as factors shrinks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectral_scale.engine.evaluate import Evaluation
from spectral_scale.errors import ConfigError
from spectral_scale.ops.decomposition import SVDFactors, compose, svd


@dataclass(frozen=True, kw_only=True)
class PrunedSize:
    """What one kept fraction leaves, over all pruned matrices."""

    keep: float
    """The fraction of each matrix's singular values that is kept, the largest first."""
    triplets: int
    """The number of singular values kept."""
    elements: int
    """Elements to store: k (m + n) as factors or m n dense, whichever is less, matrix by matrix."""
    elements_dense: int
    """Elements of the dense matrices."""
    energy: float
    """The kept fraction of the sum of squared singular values."""


@dataclass(frozen=True, kw_only=True)
class PrunedPoint(PrunedSize):
    """One point of the curve."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    """The exponential of the loss."""


class PrunableModel:
    """Sets the named linears of a dense model to any kept fraction, always from their full values.

    It keeps each full matrix and its SVD on the matrix's device: three times its memory.

    Args:
        model: a dense model; changed in place.
        names: the linear modules to prune. Each is decomposed once.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
        self._full = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._factors: dict[str, SVDFactors] = {n: svd(w) for n, w in self._full.items()}

    @torch.no_grad()
    def keep(self, fraction: float) -> PrunedSize:
        """Prune in place; at 1 every weight is exactly the unpruned one."""
        check_fraction(fraction)
        triplets = elements = dense = 0
        kept_energy = energy = 0.0
        for name, weight in self.weights.items():
            u, sigma, v = self._factors[name]
            k = max(1, round(fraction * sigma.numel()))
            full = k == sigma.numel()
            weight.copy_(self._full[name] if full else _truncated(u, sigma, v, k))
            triplets += k
            elements += min(weight.numel(), k * sum(weight.shape))
            dense += weight.numel()
            squares = sigma.double().square()
            kept_energy += float(squares[:k].sum())
            energy += float(squares.sum())
        return PrunedSize(
            keep=fraction,
            triplets=triplets,
            elements=elements,
            elements_dense=dense,
            energy=kept_energy / energy if energy else 1.0,
        )


def pruning_curve(
    model: PrunableModel, fractions: Sequence[float], measure: Callable[[], Evaluation]
) -> list[PrunedPoint]:
    """Loss and perplexity of the pruned model at each fraction; the model ends unpruned."""
    points = []
    for fraction in fractions:
        size, found = model.keep(fraction), measure()
        points.append(PrunedPoint(**vars(size), loss=found.loss, perplexity=found.perplexity))
    model.keep(1.0)
    return points


def check_fraction(fraction: float) -> None:
    """Raise ConfigError unless 0 < fraction <= 1."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"a kept fraction of {fraction} is not in (0, 1]; give e.g. 0.7")


def curve_table(points: Sequence[PrunedPoint]) -> str:
    """The curve as a Markdown table."""
    lines = [
        "| kept singular values | elements stored | energy kept | validation loss | perplexity |",
        "|---:|---:|---:|---:|---:|",
    ]
    for p in points:
        stored = p.elements / p.elements_dense
        lines.append(
            f"| {p.keep:.3g} ({p.triplets:,}) | {stored:.1%} of dense | {p.energy:.2%} | "
            f"{p.loss:.4f} | {p.perplexity:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _truncated(u: Tensor, sigma: Tensor, v: Tensor, k: int) -> Tensor:
    return compose(u[:, :k], sigma[:k], v[:, :k])
