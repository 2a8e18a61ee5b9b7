"""Buckets: matrices of one owner that are scattered together, in rounds of one bucket an owner.

In a round every owner builds one bucket, all at the same time, and then the buckets are sent one
after another. No rank holds more than its own bucket and the one that arrives.

An example with a limit of 100 bytes: rank 0 owns a (60), b (30) and c (40), rank 1 owns d (120).

    round 0    rank 0 sends (a, b), 90 bytes; then rank 1 sends (d,), alone above the limit
    round 1    rank 0 sends (c,)

Larger buckets mean fewer calls of the store, smaller ones less memory. Invariant: the plan is a
function of `owners` and `sizes`, which are equal on all ranks, so that the collectives match.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

from spectral_scale.methods.layer import FactoredLinear

BUCKET_BYTES = 256 * 2**20
"""The most bytes of a bucket, unless one matrix alone has more."""

BucketRound = list["Bucket"]
"""Buckets of different owners that are built at the same time and sent one after another."""


@dataclass(frozen=True)
class Bucket:
    """Matrices that one owner scatters in one call of the store."""

    owner: int
    """The rank that sends."""
    names: tuple[str, ...]
    """Layers, in the model's order."""


def plan_rounds(
    owners: Mapping[str, int], sizes: Mapping[str, int], limit: int | None = None
) -> list[BucketRound]:
    """Plan rounds of at most one bucket an owner; every rank makes the same plan.

    Args:
        owners: layer -> rank.
        sizes: layer -> bytes to scatter.
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
    return [[b for b in buckets if b is not None] for buckets in zip_longest(*by_owner)]


def scattered_leaves(layer: FactoredLinear, *, trained: bool) -> list[str]:
    """Names of the layer's parameters that a swap overwrites: the frozen ones, and the trained ones
    if `trained`."""
    return [*(layer.trained_shapes() if trained else ()), *layer.frozen_shapes()]


def scattered_bytes(layer: FactoredLinear) -> int:
    """Bytes of the parameters that a swap overwrites, however the backend shards them."""
    shapes = layer.trained_shapes() | layer.frozen_shapes()
    return sum(prod(s) * getattr(layer, leaf).element_size() for leaf, s in shapes.items())
