"""How long the process may run, and when it must begin to save."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping

import psutil

from spectral_scale.errors import ConfigError

END_VARIABLE = "SLURM_JOB_END_TIME"
"""When SLURM will end the job, in seconds since 1970."""
UNMEASURED_SAVE_SECONDS = 30.0
"""The time assumed for a save until one has been measured."""
SPARE_SECONDS = 5.0
"""Time kept free beyond what was measured."""
SAVE_FACTOR = 1.5
"""A save may take this many times the longest so far."""
RECENT_STEPS = 100


class TimeLimit:
    """Knows the deadline, and from the run's own steps and saves how early to stop for it.

    Args:
        limit_minutes: how long the process may live; None sets no limit of its own.
        save_seconds: the longest save of the last attempt, if known.
        environment: where SLURM says when the job ends.
        now: seconds since 1970; a clock that tests can turn.
    """

    def __init__(
        self,
        limit_minutes: float | None,
        *,
        save_seconds: float | None = None,
        environment: Mapping[str, str] = os.environ,
        now: Callable[[], float] = time.time,
    ) -> None:
        ends = [(end, END_VARIABLE) for end in _job_end(environment)]
        if limit_minutes is not None:
            started = psutil.Process().create_time()
            ends.append((started + 60 * limit_minutes, "train.time_limit_minutes"))
        end, self.source = min(ends, default=(math.inf, ""))
        # Only differences are taken from here on, by a clock that nobody sets.
        self._left_at_start = end - now()
        self._started = time.monotonic()
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._save_seconds = save_seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return self._left_at_start - (time.monotonic() - self._started)

    @property
    def margin_seconds(self) -> float:
        """How long before the deadline to stop: one more step, one save, and some to spare."""
        known = self._save_seconds
        save = UNMEASURED_SAVE_SECONDS if known is None else SAVE_FACTOR * known
        return max(self._steps, default=0.0) + save + SPARE_SECONDS

    def took_step(self, seconds: float) -> None:
        """Note what a step took with all that happened in it."""
        self._steps.append(seconds)

    def took_save(self, seconds: float) -> None:
        """Note what a save took from the state in memory to the commit."""
        self._save_seconds = max(seconds, self._save_seconds or 0.0)

    @property
    def save_seconds(self) -> float | None:
        """The longest save so far, for the next attempt."""
        return self._save_seconds

    def reached(self) -> bool:
        """Whether it is time to stop and save."""
        return self.seconds_left < self.margin_seconds

    def require_useful(self) -> None:
        """Raise ConfigError if nothing could be saved before the deadline."""
        if self.reached():
            raise ConfigError(
                f"{max(self.seconds_left, 0.0):.0f} s are left until the end "
                f"({self.source}), but stopping and saving take {self.margin_seconds:.0f} s; "
                "give the job more time"
            )


def _job_end(environment: Mapping[str, str]) -> list[float]:
    text = environment.get(END_VARIABLE, "")
    if not text:
        return []
    try:
        return [float(text)]
    except ValueError:
        raise ConfigError(
            f"{END_VARIABLE}={text!r} is not a number of seconds; unset it, or set "
            "train.time_limit_minutes instead"
        ) from None
