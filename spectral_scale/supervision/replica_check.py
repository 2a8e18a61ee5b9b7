"""Replicas that must be equal on several ranks, compared bit for bit by a hash of each tensor.

BLOOM-176B trained for weeks with layer norms that had drifted apart between ranks; here the first
comparison names tensor and rank.
"""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spectral_scale.errors import HealthError
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import Replicated

logger = logging.getLogger(__name__)

_BLOCK = 1 << 22
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x5851F42D4C957F2D
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def tensor_hash(tensor: Tensor) -> int:
    """A 64-bit hash of a tensor's bits, the same on every device. Any single flipped bit shows.

    It is the sum over i of element i's bits times an odd number made of i, modulo 2**64. These are
    integers, so the order of the additions does not matter.
    """
    words = tensor.detach().contiguous().reshape(-1)
    words = words.view(_WORDS[words.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _BLOCK):
        part = words[start : start + _BLOCK].to(torch.int64)
        index = torch.arange(start, start + part.numel(), dtype=torch.int64, device=part.device)
        total += (part * (index * _MULTIPLIER | 1)).sum()
    return int(total) * _GOLDEN & _MASK


class ReplicaCheck:
    """Decides after which steps replicas are compared: the first of an attempt, then in turn.

    Args:
        collective: all ranks of the run.
        interval: compare after every step that it divides; 0 never compares.
    """

    def __init__(self, collective: Collective, *, interval: int) -> None:
        self._collective, self._interval = collective, interval
        self._is_first = True

    def after_step(self, step: int, replicated: Callable[[], Iterable[Replicated]]) -> None:
        """Compare if it is time. Collective. Raises HealthError on every rank.

        Args:
            step: steps taken.
            replicated: lists what other ranks hold as well; called only if it is time.
        """
        first, self._is_first = self._is_first, False
        due = self._interval and (first or step % self._interval == 0)
        if self._collective.world_size == 1 or not due:
            return
        count = check_replicas(replicated(), self._collective)
        if first:
            logger.info("%d tensors are held by several ranks and equal on all of them", count)


def check_replicas(tensors: Iterable[Replicated], collective: Collective) -> int:
    """Compare what several ranks hold. Collective. Returns the number of tensors compared.

    Raises HealthError on every rank, naming the first tensor that differs and the ranks whose
    value is not that of the majority.
    """
    names, places, hashes = [], [], []
    for name, tensor, place in tensors:
        names.append(name)
        places.append(place)
        hashes.append(tensor_hash(tensor))
    if collective.world_size == 1:
        return len(names)
    gathered = collective.gather_json([places, hashes])
    fault = None
    if gathered is not None:
        counts = {len(each[0]) for each in gathered}
        if counts != {len(names)}:
            fault = f"ranks hold {sorted(counts)} replicated tensors; all must hold as many"
        else:
            fault = _first_difference(names, gathered)
    fault = collective.broadcast_json(fault)
    if fault is not None:
        raise HealthError(
            f"{fault}; memory or a network has corrupted it, or ranks computed different things: "
            "start again to resume from the last checkpoint, without the host of that rank if it "
            "happens twice"
        )
    return len(names)


def _first_difference(names: list[str], gathered: list[list[list[int]]]) -> str | None:
    for i, name in enumerate(names):
        by_place: dict[int, dict[int, list[int]]] = {}
        for rank, (places, hashes) in enumerate(gathered):
            by_place.setdefault(places[i], {}).setdefault(hashes[i], []).append(rank)
        for holders in by_place.values():
            if len(holders) > 1:
                return _describe(name, list(holders.values()))
    return None


def _describe(name: str, holders: list[list[int]]) -> str:
    """Name the ranks outside the majority, or all of them where there is no majority."""
    groups = sorted(holders, key=len, reverse=True)
    if len(groups[0]) > len(groups[1]):
        odd = sorted(rank for group in groups[1:] for rank in group)
        return f"{name} on rank {', '.join(map(str, odd))} differs from the other ranks'"
    parts = " and ".join(", ".join(map(str, group)) for group in groups)
    return f"{name} differs between rank {parts}"
