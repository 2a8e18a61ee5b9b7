"""Saving, at once or in the background. One save at a time; what fails, fails on all ranks."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import TensorChunk

logger = logging.getLogger(__name__)

WORTH_A_WARNING_SECONDS = 0.5
"""A shorter wait for a save in the background goes unmentioned."""
ABANDON_SECONDS = 10.0
"""How long a run that has failed waits for a save that is under way."""


class Saver:
    """Hands checkpoints to the manager. All methods are collective.

    Args:
        checkpoints: of the run; with `background`, its collective has a group of its own, since
            its collectives run beside the training's.
        identity: what a resumed run must share.
        background: copy to host memory, and write beside training.
    """

    def __init__(
        self, checkpoints: CheckpointManager, identity: Mapping[str, Any], *, background: bool
    ) -> None:
        self._checkpoints, self._identity, self.background = checkpoints, identity, background
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: Exception | None = None
        self._seconds = 0.0
        self.longest_seconds = 0.0
        """From the state in memory to the commit, of the longest save so far."""

    @property
    def in_flight(self) -> bool:
        """Whether a save has been begun and not been collected."""
        return self._thread is not None

    @property
    def written(self) -> bool:
        """Whether this rank's part of the save in flight is done, well or badly."""
        return self._thread is not None and not self._thread.is_alive()

    def save(self, step: int, chunks: Sequence[TensorChunk], state: Mapping[str, Any]) -> None:
        """Save, or begin to. Raises CheckpointError on all ranks alike.

        One that is under way must have been finished before: saves never pile up.
        """
        if self.in_flight:
            raise RuntimeError(f"the save of step {self._step} has not been finished")
        started = time.perf_counter()
        self._step = step
        if not self.background:
            self._write(chunks, state, started)
            self._raise()
            return
        snapshot = [
            TensorChunk(c.name, c.tensor.detach().to("cpu", copy=True), c.global_shape, c.offset)
            for c in chunks
        ]
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, state, started), name="save", daemon=True
        )
        self._thread.start()

    def finish(self) -> int | None:
        """Wait for the save in flight; the step that is now saved, None if nothing was in flight.

        Raises CheckpointError on all ranks alike.
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
        """The run has failed: give a save that is under way some time. Never raises."""
        if self._thread is not None:
            self._thread.join(ABANDON_SECONDS)

    @property
    def last_seconds(self) -> float:
        """What the last complete save took."""
        return self._seconds

    def _write(
        self, chunks: Sequence[TensorChunk], state: Mapping[str, Any], started: float
    ) -> None:
        self._error = None
        try:
            self._checkpoints.save(self._step, chunks, state=state, identity=self._identity)
        except Exception as error:
            self._error = error
        self._seconds = time.perf_counter() - started
        self.longest_seconds = max(self.longest_seconds, self._seconds)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            raise error
        if error is not None:
            raise CheckpointError(f"step {self._step} was not saved: {error!r}") from error
