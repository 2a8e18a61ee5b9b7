"""Steps that the device judges: what the host does before it knows, and once it does.

A step in which nothing else needs the verdict is left open, and the verdict is read in the next
step, after its passes are queued: the device never waits for the host. An open step that turns out
to have been left out has changed no weight, moment or step count (the update obeyed the device's
flag) and no direction (so did the retraction); only counters of the host are put right, before any
of them is used again. So whether a verdict is read at once or late changes no bit of a run.

A verdict is read at once where the host must act on it: in steps that are logged, evaluated or
saved, before a swap, under a gradient filter, after a step that was left out where one more would
return the run to a checkpoint, and where the optimizer or the method cannot follow the device.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

from spectral_scale.backends.base import StepStats
from spectral_scale.data.loader import StepBatch
from spectral_scale.engine.run import Run
from spectral_scale.methods.base import FollowsOpenSteps
from spectral_scale.metrics.sinks import MetricsLog, NullLog
from spectral_scale.supervision.incidents import step_data
from spectral_scale.supervision.supervisor import Supervisor

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _OpenStep:
    """A step that the device has judged and the host has not asked about."""

    step: int
    """Counted from 1."""
    data_step: int
    """The step whose batch it read."""


class LateVerdicts:
    """Counts the steps that were left out, and tells of each of them.

    Args:
        run: the run that is trained.
        supervisor: reads verdicts.
        log: receives `health/skipped` of a step whose verdict is read late.
    """

    def __init__(self, run: Run, supervisor: Supervisor, log: MetricsLog | NullLog) -> None:
        self._run, self._supervisor, self._log = run, supervisor, log
        self.skipped_steps = run.skipped_steps
        """Steps that updated nothing, up to the latest one whose verdict is known."""
        self._open: _OpenStep | None = None

    def may_wait(self) -> bool:
        """Whether the coming step of the method and the rules of health do without its verdict."""
        run = self._run
        follows = run.controller is None or (
            isinstance(run.controller, FollowsOpenSteps) and not run.controller.needs_verdict()
        )
        return (
            follows and run.gradient_filter is None and not self._supervisor.verdict_may_roll_back
        )

    def add(
        self, step: int, batch: StepBatch, stats: StepStats, values: dict[str, Any], *, wait: bool
    ) -> StepStats:
        """Take note of a step, and find out whether it was applied unless that can `wait`.

        Args:
            step: counted from 1.
            batch: its data.
            stats: its outcome as far as it is known.
            values: receives what is logged of a step that was left out.
            wait: leave the step open if the device decides.

        Returns `stats`, with the answer unless the step is left open.
        """
        if stats.applied is None and wait:
            self._open = _OpenStep(step=step, data_step=batch.step)
            return stats
        verdict = self._supervisor.read_verdict()
        if stats.applied is None:
            stats = replace(stats, applied=verdict.healthy, left_out=None)
        if not stats.applied:
            self._left_out(step, batch.step, stats, verdict.reason, values)
        return stats

    def close(self) -> bool | None:
        """Read the verdict of the open step, if there is one; whether it was applied."""
        opened, self._open = self._open, None
        if opened is None:
            return None
        verdict = self._supervisor.read_verdict()
        if verdict.healthy:
            return True
        if self._run.controller is not None:
            self._run.controller.applied_steps -= 1
        values: dict[str, Any] = {}
        self._left_out(opened.step, opened.data_step, None, verdict.reason, values)
        self._log.write(opened.step, values)
        return False

    def _left_out(
        self,
        step: int,
        data_step: int,
        stats: StepStats | None,
        reason: str | None,
        values: dict[str, Any],
    ) -> None:
        """The step's data is consumed; schedules and swaps count applied steps only."""
        self.skipped_steps += 1
        if stats is not None and stats.overflowed:
            logger.warning(
                "step %d updated nothing: gradients overflowed in fp16 at loss scale %g",
                step,
                stats.loss_scale,
            )
            return
        reason = reason or "the backend skipped it"
        values["health/skipped"] = reason
        if self._run.backend.collective.rank == 0:
            read = step_data(self._run.loader, data_step)
            message = "step %d is left out: %s; its batch holds samples %s"
            logger.warning(message, step, reason, read["samples"])
            self._supervisor.record_incident("skipped step", step, reason=reason, **read)
