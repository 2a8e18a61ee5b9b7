"""The phases of a swap: the seconds of each, and the phase in which a swap broke off."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

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
    """Times the phases of the swap in progress on this rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.iteration = 0
        self.seconds: dict[str, float] = {}
        self.listeners: list[Listener] = []

    def start(self, iteration: int) -> None:
        """Begin a swap: every phase is back at zero seconds."""
        self.iteration, self.seconds = iteration, dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside, and tell the listeners that it begins.

        Where a collective fails, because a rank is gone, the error gets a note with phase and rank.
        """
        logger.debug("iteration %d: %s", self.iteration, name)
        for listener in self.listeners:
            listener(name, self.iteration)
        started = time.perf_counter()
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
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


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
