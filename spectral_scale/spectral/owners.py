"""Which rank decomposes which matrix: deterministic, recomputed at start, never saved."""

from collections.abc import Mapping


def assign_owners(shapes: Mapping[str, tuple[int, int]], world_size: int) -> dict[str, int]:
    """Owner rank by matrix name: largest job first, cost max(m, n) * min(m, n)^2.

    A pure function of names, shapes and world size; ties go by name, then to the lowest rank.
    """
    cost = {name: max(shape) * min(shape) ** 2 for name, shape in shapes.items()}
    load = [0] * world_size
    owners = {}
    for name in sorted(cost, key=lambda n: (-cost[n], n)):
        rank = load.index(min(load))
        owners[name] = rank
        load[rank] += cost[name]
    return {name: owners[name] for name in shapes}
