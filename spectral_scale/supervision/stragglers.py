"""Ranks that keep the others waiting."""

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

FACTOR = 1.5
"""A rank that works so many times as long as the median rank is a straggler ..."""
LEAST_SECONDS = 0.02
"""... if that is at least so much longer a step ..."""
IN_A_ROW = 2
"""... at so many logged steps in a row."""


class Stragglers:
    """Compares what ranks need for a batch, its forward passes and all but the last backward pass.

    In the last one, gradients are exchanged, and all ranks take as long as the slowest. Where
    weights are gathered for each block (FSDP2, ZeRO-3) that holds for forward passes, too: then
    only slow data and slow starts show.
    """

    def __init__(self, host_of: Callable[[int], str]) -> None:
        self._host_of = host_of
        self._sums: list[float] = []
        self._steps = 0
        self._suspect, self._seen = -1, 0

    def add(self, work_seconds: Sequence[float]) -> None:
        """Seconds of each rank in one step."""
        if len(self._sums) != len(work_seconds):
            self._sums = [0.0] * len(work_seconds)
        self._sums = [a + b for a, b in zip(self._sums, work_seconds, strict=True)]
        self._steps += 1

    def metrics(self) -> dict[str, Any]:
        """Means since the last call, by metric path; warns of a straggler. Nothing for one rank."""
        if len(self._sums) < 2 or not self._steps:
            return {}
        means = [total / self._steps for total in self._sums]
        self._sums, self._steps = [], 0
        slowest = max(range(len(means)), key=means.__getitem__)
        median = statistics.median_low(means)
        self._judge(slowest, means[slowest], median)
        return {
            "ranks/slowest": slowest,
            "ranks/slowest_seconds": means[slowest],
            "ranks/median_seconds": median,
        }

    def _judge(self, rank: int, seconds: float, median: float) -> None:
        slow = seconds > FACTOR * median and seconds - median > LEAST_SECONDS
        same = slow and rank == self._suspect
        self._seen = self._seen + 1 if same else int(slow)
        self._suspect = rank if slow else -1
        if self._seen == IN_A_ROW:
            logger.warning(
                "rank %d on %s keeps the others waiting: %.3f s of work a step, the median rank "
                "%.3f s; look at that host's data, clocks and other processes",
                rank,
                self._host_of(rank),
                seconds,
                median,
            )
