"""The limit on starts in a row that save nothing new, so that a run is not retried for ever."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from spectral_scale.errors import NoProgressError
from spectral_scale.supervision.status import (
    STATUS_NAME,
    State,
    read_status,
    saved_step,
    write_json,
    write_status,
)

logger = logging.getLogger(__name__)


class RestartLimit:
    """Counts a run's starts since a checkpoint was last added. Rank 0 only, under the run's lock.

    A start counts from the moment it is opened, so that a start that is killed counts as well. A
    run that ended in order (complete, or asked to stop) has not failed and resets the count.
    """

    def __init__(self, run_dir: Path, *, steps: int, limit: int) -> None:
        self._run_dir, self._steps, self._limit = run_dir, steps, limit
        self._start_step = 0
        self._before: dict[str, Any] = {}
        self._fruitless = 0
        """Starts before this one that saved nothing new."""

    def open(self) -> None:
        """Count this start. Raises NoProgressError if as many as allowed have led nowhere."""
        before, self._start_step = read_status(self._run_dir), saved_step(self._run_dir)
        self._before = before
        in_vain = before.get("state") in ("running", "failed")
        if in_vain and before.get("start_step") == self._start_step:
            self._fruitless = _count(before.get("starts_without_progress")) + 1
        if self._limit and self._fruitless >= self._limit:
            raise self._give_up(str(before.get("reason") or "killed without a word"))
        if self._fruitless:
            logger.warning(
                "start %d since step %d was saved; the last one: %s",
                self._fruitless + 1,
                self._start_step,
                before.get("reason") or "killed without a word",
            )
        self._write("running", "")

    def failed(self, reason: str) -> NoProgressError | None:
        """Note how this start failed. Returns the error to end with if no more are allowed."""
        if self._limit and self.progressed_to() is None and self._fruitless + 1 >= self._limit:
            self._fruitless += 1
            return self._give_up(reason)
        return None

    def withdraw(self) -> None:
        """Put the former status back: the configuration was refused before anything began."""
        path = self._run_dir / STATUS_NAME
        with contextlib.suppress(OSError):
            if self._before:
                write_json(path, self._before)
            else:
                path.unlink(missing_ok=True)

    def progressed_to(self) -> int | None:
        """The step of the newest checkpoint if this start added it, else None."""
        now = saved_step(self._run_dir)
        return now if now > self._start_step else None

    def _give_up(self, reason: str) -> NoProgressError:
        error = NoProgressError(
            f"{self._fruitless} starts in a row saved nothing after step {self._start_step}; the "
            f"last one: {reason}; look at {self._run_dir / 'logs'}, then start again (the count "
            "begins anew; train.max_starts_without_progress sets it)"
        )
        self._fruitless = 0
        self._write("no_progress", str(error))
        return error

    def _write(self, state: State, reason: str) -> None:
        write_status(
            self._run_dir,
            state,
            step=self._start_step,
            steps=self._steps,
            reason=reason,
            start_step=self._start_step,
            starts_without_progress=self._fruitless,
        )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
