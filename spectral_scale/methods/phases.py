"""The phases of a swap: the seconds of each, and the phase in which a swap broke off."""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch

from spectral_scale.parallel.device_time import Span

logger = logging.getLogger(__name__)

PHASES = ("collect", "commit", "decompose", "sample", "rebuild", "agree", "deliver", "reset")
"""The phases of a swap in their order, under the names that metrics give them.

"collect" and "commit" alternate matrix by matrix, "rebuild" to "deliver" bucket by bucket.
"""
COLLECTIVE_PHASES = frozenset({"collect", "agree", "deliver", "reset"})
"""Phases in which ranks wait for one another."""

Listener = Callable[[str, int], None]
"""Called as (phase, iteration that begins) whenever this rank enters a phase."""


class PhaseClock:
    """Times the phases of the swap in progress on this rank.

    On a GPU a phase lasts from when the device comes to its begin until it comes to its end: the
    host has queued it long before, or has waited for it in another phase.

    Args:
        rank: this process.
        device: where the work is done; None: on the host.
    """

    def __init__(self, rank: int, device: torch.device | None = None) -> None:
        self.rank = rank
        self.iteration = 0
        self.listeners: list[Listener] = []
        self._device = device
        self._spans: list[tuple[str, Span]] = []
        self._seconds: dict[str, float] = {}

    def start(self, iteration: int) -> None:
        """Begin a swap: every phase is back at zero seconds."""
        self.iteration, self._seconds = iteration, dict.fromkeys(PHASES, 0.0)
        self._spans = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase of the swap so far; waits until the device has done it."""
        spans, self._spans = self._spans, []
        for name, span in spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + span.seconds()
        return self._seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside, and tell the listeners that it begins.

        Where a collective fails, because a rank is gone, the error gets a note with phase and rank.
        """
        logger.debug("iteration %d: %s", self.iteration, name)
        for listener in self.listeners:
            listener(name, self.iteration)
        span = Span(self._device)
        self._spans.append((name, span))
        try:
            yield
        except RuntimeError as error:
            if name in COLLECTIVE_PHASES:
                error.add_note(
                    f"rank {self.rank} broke off in phase {name!r} of the swap before "
                    f"iteration {self.iteration}"
                )
            raise
        finally:
            span.end()


class OwnerWork:
    """An owner's work on its matrices: an error is kept for all ranks to agree on.

    An owner that raised at once would leave the others waiting. After an error, which `problem`
    holds, an owner begins no further work.
    """

    def __init__(self) -> None:
        self.problem: str | None = None

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Keep an error of what is inside as the problem of matrix `name`."""
        try:
            yield
        except (ValueError, RuntimeError, MemoryError) as error:
            self.problem = f"{name}: {error}; restart from the last checkpoint"
            if isinstance(error, ValueError):  # not finite
                self.problem += " with a lower learning rate"
