"""Owners: the rank that decomposes a matrix; deterministic, recomputed at start, never saved."""

from collections.abc import Mapping
from heapq import heapify, heapreplace


def assign_owners(
    shapes: Mapping[str, tuple[int, int]],
    world_size: int,
    *,
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Owner rank by matrix name: largest job first, cost max(m, n) * min(m, n)^2.

    A pure function of its arguments; ties go by name, then to the lowest rank. The owners in
    `fixed` are kept, and their load counts.

    assign_owners({"a": (8, 4), "b": (4, 4), "c": (4, 4)}, 2) costs 128, 64 and 64, and gives a to
    rank 0, b and c to rank 1.
    """
    cost = {name: decomposition_cost(shape) for name, shape in shapes.items()}
    load = [0] * world_size
    owners = dict(fixed or {})
    for name, rank in owners.items():
        load[rank] += cost[name]
    lightest = [(total, rank) for rank, total in enumerate(load)]
    heapify(lightest)
    for name in sorted(cost.keys() - owners.keys(), key=lambda n: (-cost[n], n)):
        total, rank = lightest[0]
        owners[name] = rank
        heapreplace(lightest, (total + cost[name], rank))
    return {name: owners[name] for name in shapes}


def decomposition_cost(shape: tuple[int, int]) -> int:
    """max(m, n) * min(m, n)^2, to which the time of a decomposition is proportional."""
    return max(shape) * min(shape) ** 2
