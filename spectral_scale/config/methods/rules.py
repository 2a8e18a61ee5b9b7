"""Rules that several methods share: which linears they convert, and whether a rank fits them."""

from collections.abc import Iterator

from spectral_scale.config.presets import Architecture, linear_shapes
from spectral_scale.config.schema import SpectralConfig

TARGET_KEYS = frozenset({"spectral.targets", "spectral.train_dense", "spectral.train_also"})
"""Keys of every method that converts linears."""
NO_MATRIX = "it trains no dense matrix in the blocks; use layers or block_gains"
"""Why the spectral filter finds nothing to filter inside the matrices of a converting method."""


def converted_shapes(
    spectral: SpectralConfig, architecture: Architecture
) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear of one block that the method converts."""
    shapes = linear_shapes(architecture)
    return {n: s for n, s in shapes.items() if not spectral.targets or n in spectral.targets}


def rank_problems(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    """What is wrong with `spectral_rank` for the model's linear layers, if anything."""
    r = spectral.spectral_rank
    for name, (out_features, in_features) in converted_shapes(spectral, architecture).items():
        if r > min(out_features, in_features):
            yield (
                f"spectral.spectral_rank={r} exceeds min(m, n)={min(out_features, in_features)} of "
                f"{name} ({out_features} x {in_features}); lower it to at most that"
            )


def ring_bytes(nbytes: float, ranks: int) -> float:
    """Bytes over each rank's links when owners send `nbytes` in all to all of `ranks` ranks: each
    rank receives, and passes on, (N - 1) / N of them."""
    return nbytes * (ranks - 1) / ranks


def decomposition_bytes(itemsize: int, shape: tuple[int, int]) -> int:
    """Workspace of one SVD (m, n): the matrix and a copy, its factors, 4 k^2 of the driver."""
    m, n = shape
    k = min(m, n)
    return itemsize * (2 * m * n + k * (m + n + 1) + 4 * k * k)
