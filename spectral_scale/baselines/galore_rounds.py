"""In which order owners work on GaLore's matrices, and what moves between ranks each time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

from spectral_scale.parallel.exchange import Exchange
from spectral_scale.parallel.pieces import Pieces


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is under way at one time."""

    fqns: tuple[str, ...]
    """The matrices."""
    mine: Mapping[str, int]
    """Those that this rank owns, each with the copy of the model where it is decomposed."""
    exchange: Exchange | None
    """Gradients to owners, updates back; None where one rank holds all of each."""


def plan_rounds(fqns: Sequence[str], owners: Mapping[str, int], pieces: Pieces) -> list[Round]:
    """Each owner's next matrix, one after another, so that memory is that of a matrix.

    The largest come first, so that owners are busy with alike ones at the same time. Where ranks
    hold everything, nothing is moved, and a round is a matrix for each of them to decompose.
    """
    size, copies = pieces.group.size, len(pieces.group.copy_ranks)
    by_owner: list[list[str]] = [[] for _ in range(size)]
    for fqn in sorted(fqns, key=lambda fqn: (-prod(pieces.shapes[fqn]), fqn)):
        by_owner[owners[fqn]].append(fqn)
    at_a_time = copies if size == 1 else 1
    turns = [
        [queue[i : i + at_a_time] for i in range(0, len(queue), at_a_time)] for queue in by_owner
    ]
    rounds = []
    for number, turn in enumerate(zip_longest(*turns, fillvalue=[])):
        mine = {fqn: (number + i) % copies for i, fqn in enumerate(turn[pieces.group.index])}
        together = tuple(fqn for owned in turn for fqn in owned)
        rounds.append(Round(fqns=together, mine=mine, exchange=_exchange(together, owners, pieces)))
    return rounds


def _exchange(fqns: Sequence[str], owners: Mapping[str, int], pieces: Pieces) -> Exchange | None:
    size = pieces.group.size
    if size == 1:
        return None
    wanted = [
        [(0, prod(pieces.shapes[fqn]) if rank == owners[fqn] else 0) for rank in range(size)]
        for fqn in fqns
    ]
    return Exchange([pieces.held(fqn) for fqn in fqns], wanted, pieces.group)
