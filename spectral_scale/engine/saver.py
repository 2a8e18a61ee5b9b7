"""Saves checkpoints, at once or in the background. One save at a time, with one outcome for all.

What may be changed when, for a background save of step 100 that takes 2 s to copy and 30 s to
write, in a run whose steps take 1 s:

    t        main thread                            thread "save"
    0        save(100): copies each chunk to host
             memory; nothing trains meanwhile (a GPU
             computes step 101 up to its update)
    2        starts the thread; step 101 begins     writes the copies
    2..32    trains: weights, moments, banks and    reads only the copies, `state` (made for this
             masters change in place                save) and `identity` (never changed)
    20       save(120) would raise: it must be      still writes; a second save would double the
             preceded by finish()                   host memory and could overtake the first
    32                                              commits with the other ranks, and ends
    33       end_step: every rank reports that
             its part is written; all call finish()

So a tensor may change as soon as save() has returned, and not before; on a GPU, what is queued
after before_update() may change it. Without `background` nothing
is copied, and save() returns after the commit. The thread's collectives have a process group of
their own: on the training's they would mix with the gradients' in an order that differs by rank.
`_error` and `_seconds` belong to the thread until finish() has joined it. If the run fails,
abandon() waits up to 10 s, since the save may be about to commit; an uncommitted folder is no
checkpoint, and the next save of that step removes it.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.engine.host_copies import HostCopies
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import TensorChunk

logger = logging.getLogger(__name__)

WORTH_A_WARNING_SECONDS = 0.5
"""A shorter wait for a save in the background is not logged."""
ABANDON_SECONDS = 10.0
"""How long a run that has failed waits for a save in flight."""


class Saver:
    """Hands checkpoints to the manager. `save` and `finish` are collective.

    Args:
        checkpoints: the run's; with `background`, its collective has a process group of its own.
        identity: what a run must have in common with the checkpoint to resume from it.
        background: copy to host memory, and write while training goes on.
    """

    def __init__(
        self, checkpoints: CheckpointManager, identity: Mapping[str, Any], *, background: bool
    ) -> None:
        self._checkpoints, self._identity, self.background = checkpoints, identity, background
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: Exception | None = None
        self._seconds = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a save was begun in the background and `finish` has not been called."""
        return self._thread is not None

    @property
    def written(self) -> bool:
        """Whether this rank's part of the save in flight has ended, successfully or not."""
        return self._thread is not None and not self._thread.is_alive()

    def save(self, step: int, chunks: Sequence[TensorChunk], state: Mapping[str, Any]) -> None:
        """Save, or begin to save in the background. Raises CheckpointError on all ranks alike.

        Args:
            step: steps taken.
            chunks: what this rank saves; the tensors may change once this returns and, where they
                are a GPU's, `before_update` has been called.
            state: counters, as JSON values; must not change before `finish`.
        """
        if self.in_flight:
            raise RuntimeError(f"the save of step {self._step} is in flight; call finish() first")
        started = time.perf_counter()
        self._step = step
        if not self.background:
            self._write(chunks, state, started)
            self._raise()
            return
        snapshot = self._copies.take(chunks)
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, state, started), name="save", daemon=True
        )
        self._thread.start()

    def before_update(self) -> None:
        """Let the device make the copies of a save, if it has not, before what it is given next."""
        self._copies.before_change()

    def finish(self) -> int | None:
        """Wait for the save in flight.

        Returns the step that is now saved, or None if nothing was in flight. Raises
        CheckpointError on all ranks alike.
        """
        if self._thread is None:
            return None
        started = time.perf_counter()
        self._thread.join()
        self._thread = None
        waited = time.perf_counter() - started
        if waited > WORTH_A_WARNING_SECONDS:
            logger.warning(
                "training waited %.1f s for the checkpoint of step %d, which was being written; "
                "raise checkpoint.interval if this happens again",
                waited,
                self._step,
            )
        self._raise()
        return self._step

    def abandon(self) -> None:
        """Give a save in flight some time to end, after the run has failed. Never raises."""
        if self._thread is not None:
            self._thread.join(ABANDON_SECONDS)

    @property
    def last_seconds(self) -> float:
        """Seconds from the state in memory to the commit, of the last save that has ended."""
        return self._seconds

    def _write(
        self, chunks: Sequence[TensorChunk], state: Mapping[str, Any], started: float
    ) -> None:
        self._error = None
        try:
            self._copies.wait()
            self._checkpoints.save(self._step, chunks, state=state, identity=self._identity)
        except Exception as error:
            self._error = error
        self._seconds = time.perf_counter() - started

    def _raise(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            raise error
        if error is not None:
            raise CheckpointError(f"step {self._step} was not saved: {error!r}") from error
