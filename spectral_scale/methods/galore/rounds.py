"""In which order owners work on GaLore's matrices, and what moves between ranks each time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

from spectral_scale.parallel.exchange import Exchange
from spectral_scale.parallel.flat_shards import ParameterShards
from spectral_scale.parallel.shard_geometry import Range


@dataclass(frozen=True, kw_only=True)
class ProjectionRound:
    """What is under way at one time."""

    fqns: tuple[str, ...]
    """The matrices."""
    mine: Mapping[str, int]
    """Those that this rank owns, each with the copy of the model where it is decomposed."""
    exchange: Exchange | None
    """Gradients to owners, updates back; None where the owners hold all of theirs."""


def plan_rounds(
    fqns: Sequence[str], owners: Mapping[str, int], pieces: ParameterShards
) -> list[ProjectionRound]:
    """Each owner's next matrix, one after another, so that memory is that of a matrix.

    Those that travel come first, and the largest among them, so that few rounds communicate and
    owners are busy with alike matrices at the same time. Where every rank holds everything, a round
    is a matrix for each of them to decompose.
    """
    size, copies = pieces.group.size, pieces.group.num_replicas
    by_owner: list[list[str]] = [[] for _ in range(size)]
    moved = {fqn for fqn in fqns if pieces.ranges(fqn)[owners[fqn]] != _whole(fqn, pieces)}
    for fqn in sorted(fqns, key=lambda f: (f not in moved, -prod(pieces.shapes[f]), f)):
        by_owner[owners[fqn]].append(fqn)
    at_a_time = copies if size == 1 else 1
    turns = [
        [queue[i : i + at_a_time] for i in range(0, len(queue), at_a_time)] for queue in by_owner
    ]
    rounds = []
    for number, turn in enumerate(zip_longest(*turns, fillvalue=[])):
        mine = {fqn: (number + i) % copies for i, fqn in enumerate(turn[pieces.group.index])}
        together = tuple(fqn for owned in turn for fqn in owned)
        exchange = _exchange(together, owners, pieces) if moved.intersection(together) else None
        rounds.append(ProjectionRound(fqns=together, mine=mine, exchange=exchange))
    return rounds


def _exchange(fqns: Sequence[str], owners: Mapping[str, int], pieces: ParameterShards) -> Exchange:
    ranks = range(pieces.group.size)
    wanted = [
        [_whole(fqn, pieces) if rank == owners[fqn] else (0, 0) for rank in ranks] for fqn in fqns
    ]
    return Exchange([pieces.ranges(fqn) for fqn in fqns], wanted, pieces.group)


def _whole(fqn: str, pieces: ParameterShards) -> Range:
    return 0, prod(pieces.shapes[fqn])
