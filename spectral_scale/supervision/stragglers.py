"""Ranks that keep the others waiting."""

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spectral_scale.parallel.device_time import Span

logger = logging.getLogger(__name__)

FACTOR = 1.5
"""A straggler works at least this many times as long as the median rank, ..."""
LEAST_SECONDS = 0.02
"""... at least this much longer a step, ..."""
IN_A_ROW = 2
"""... and that at this many logged steps in a row."""


class WorkClock:
    """Times what this rank does in a step without the others.

    Args:
        device: of the run. On a GPU the clock is the device's, from the end of the work before to
            the end of this rank's own, with the wait for data in between.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._span = Span(device)
        self._before: Span | None = None

    def start(self) -> None:
        """This rank asks for the batch of a step."""
        self._span = Span(self._device)

    def stop(self) -> None:
        """This rank comes to where it needs the others."""
        self._span.end()

    def seconds(self) -> float:
        """Seconds of this rank's own work in the latest step, to be asked once a step.

        On a GPU they are those of the step before, so that nothing waits for the device.
        """
        if self._device.type != "cuda":
            return self._span.seconds()
        before, self._before = self._before, self._span
        return 0.0 if before is None else before.seconds()


class Stragglers:
    """Compares the time that ranks need for a batch and its passes, but the last backward pass.

    In the last backward pass gradients are exchanged, and all ranks take as long as the slowest.
    Where weights are gathered for each block (FSDP2, ZeRO-3) the same holds for forward passes, so
    that only slow data and slow starts show.
    """

    def __init__(self, host_of: Callable[[int], str]) -> None:
        self._host_of = host_of
        self._sums: list[float] = []
        self._steps = 0
        self._suspect, self._seen = -1, 0

    def add(self, work_seconds: Sequence[float]) -> None:
        """Add the seconds that each rank worked in one step."""
        if len(self._sums) != len(work_seconds):
            self._sums = [0.0] * len(work_seconds)
        self._sums = [a + b for a, b in zip(self._sums, work_seconds, strict=True)]
        self._steps += 1

    def metrics(self) -> dict[str, Any]:
        """Means since the last call, by metric path, empty for one rank; warns of a straggler."""
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
