"""The order in which owners work on GaLore's matrices, and what moves between ranks each time.

An example with two ranks: rank 0 owns B (1024 x 1024, sharded) and C (1024 x 1024, whole on rank
0), rank 1 owns A (4096 x 1024, sharded).

    round 0    B on rank 0, A on rank 1    exchange: gradients to the owners, updates back
    round 1    C on rank 0                 no exchange: its owner holds all of it

A rank holds one gathered gradient at a time, and the projections of a round run side by side.
Invariant: all ranks plan the same rounds from the same inputs, so that their collectives match.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

from spectral_scale.parallel.exchange import Exchange
from spectral_scale.parallel.flat_shards import ParameterShards
from spectral_scale.parallel.shard_geometry import Range


@dataclass(frozen=True, kw_only=True)
class ProjectionRound:
    """The matrices that are gathered, updated and scattered at one time."""

    fqns: tuple[str, ...]
    """The matrices of all owners, in the order in which they are exchanged."""
    mine: Mapping[str, int]
    """This rank's matrices, each with the replica of the model that decomposes it."""
    exchange: Exchange | None
    """Gradients to owners, updates back; None where the owners hold all of theirs."""


def plan_rounds(
    fqns: Sequence[str], owners: Mapping[str, int], shards: ParameterShards
) -> list[ProjectionRound]:
    """Rounds of one matrix an owner, so that a rank needs memory for one matrix at a time.

    Matrices that travel come first, the largest of them first, so that few rounds communicate and
    owners work on matrices of similar size at the same time. Where every rank holds all matrices,
    a round holds one matrix for each replica to decompose.
    """
    size, replicas = shards.group.size, shards.group.num_replicas
    by_owner: list[list[str]] = [[] for _ in range(size)]
    moved = {fqn for fqn in fqns if shards.ranges(fqn)[owners[fqn]] != _whole(fqn, shards)}
    for fqn in sorted(fqns, key=lambda f: (f not in moved, -prod(shards.shapes[f]), f)):
        by_owner[owners[fqn]].append(fqn)
    at_a_time = replicas if size == 1 else 1
    turns = [
        [queue[i : i + at_a_time] for i in range(0, len(queue), at_a_time)] for queue in by_owner
    ]
    rounds = []
    for number, turn in enumerate(zip_longest(*turns, fillvalue=[])):
        mine = {fqn: (number + i) % replicas for i, fqn in enumerate(turn[shards.group.index])}
        together = tuple(fqn for owned in turn for fqn in owned)
        exchange = _exchange(together, owners, shards) if moved.intersection(together) else None
        rounds.append(ProjectionRound(fqns=together, mine=mine, exchange=exchange))
    return rounds


def _exchange(fqns: Sequence[str], owners: Mapping[str, int], shards: ParameterShards) -> Exchange:
    ranks = range(shards.group.size)
    wanted = [
        [_whole(fqn, shards) if rank == owners[fqn] else (0, 0) for rank in ranks] for fqn in fqns
    ]
    return Exchange([shards.ranges(fqn) for fqn in fqns], wanted, shards.group)


def _whole(fqn: str, shards: ParameterShards) -> Range:
    return 0, prod(shards.shapes[fqn])
