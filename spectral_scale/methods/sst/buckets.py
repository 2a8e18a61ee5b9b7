"""Which matrices travel together: parcels of one owner, delivered in rounds.

In a round every owner builds one bucket, all at the same time, and then they are sent one after
another. No rank holds more than its own bucket and the one that arrives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

from spectral_scale.methods.sst.layer import SpectralLinear

BUCKET_BYTES = 256 * 2**20
"""Most bytes of a bucket, unless one matrix alone has more."""

Round = list["Bucket"]


@dataclass(frozen=True)
class Bucket:
    """Matrices that one owner delivers in one call of the store."""

    owner: int
    """The rank that sends."""
    names: tuple[str, ...]
    """Layers, in the model's order."""


def plan_rounds(
    owners: Mapping[str, int], sizes: Mapping[str, int], limit: int | None = None
) -> list[Round]:
    """Rounds of at most one bucket an owner; the same on every rank.

    Args:
        owners: layer -> rank.
        sizes: layer -> bytes to deliver.
        limit: most bytes a bucket; by default BUCKET_BYTES.
    """
    limit = BUCKET_BYTES if limit is None else limit
    waiting: dict[int, list[list[str]]] = {}
    filled: dict[int, int] = {}
    for name, owner in owners.items():
        mine = waiting.setdefault(owner, [])
        if not mine or filled[owner] + sizes[name] > limit:
            mine.append([])
            filled[owner] = 0
        mine[-1].append(name)
        filled[owner] += sizes[name]
    by_owner = [[Bucket(owner, tuple(n)) for n in waiting[owner]] for owner in sorted(waiting)]
    return [[p for p in buckets if p is not None] for buckets in zip_longest(*by_owner)]


def scattered_leaves(layer: SpectralLinear, *, trained: bool) -> list[str]:
    """Names of the layer's parameters that a boundary overwrites, or only of the frozen ones."""
    return [*(layer.trained_shapes() if trained else ()), *layer.frozen_shapes()]


def scattered_bytes(layer: SpectralLinear) -> int:
    """Bytes of all of them, whatever a host did to the storage."""
    shapes = layer.trained_shapes() | layer.frozen_shapes()
    return sum(prod(s) * getattr(layer, leaf).element_size() for leaf, s in shapes.items())
