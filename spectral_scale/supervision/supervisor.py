"""Everything that may stop a run, leave a step out or end a hang: the loop asks one object."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from spectral_scale.backends.limits import WaitLimits
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import HealthError, WaitingForDataError
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import Replicated
from spectral_scale.supervision.consensus import Consensus, RankReport, reach_consensus
from spectral_scale.supervision.control_files import ControlFiles, Request
from spectral_scale.supervision.health import HealthMonitor, Verdict
from spectral_scale.supervision.heartbeat import Phase, forget
from spectral_scale.supervision.incidents import record
from spectral_scale.supervision.replica_check import ReplicaCheck
from spectral_scale.supervision.signals import StopRequest
from spectral_scale.supervision.status import read_status, write_status
from spectral_scale.supervision.step_judge import JudgedStep, StepJudge
from spectral_scale.supervision.stragglers import Stragglers, WorkClock
from spectral_scale.supervision.time_limit import TimeLimit
from spectral_scale.supervision.watchdog import End, Watchdog

WAIT_AFTER_STOP_SECONDS = 10.0
"""Time that data has to arrive after a stop, where a rank of several waits for it; then the run
ends without a save."""


class Supervisor:
    """One rank's signals, clock, control files and heartbeat, and what all ranks make of them.

    Use it as a context manager around the loop. In each step every rank calls, in this order:
    `begin_step`, `judge_step` (asked by the backend, perhaps never), `end_step`. After that
    `consensus` holds what all ranks agreed on in the step. `read_verdict` tells what `judge_step`
    found, at the latest before the next `begin_step`.

    Args:
        config: the run's; its `train` and `health` sections are read.
        collective: all ranks of the run.
        device: of the run.
        data_world_size: ranks that see different data.
        saved_health: `health_state()` of the checkpoint that the run goes on from, if any.
        checkpoint_written: tells whether this rank's part of a background save is done.
        end: ends the process of a run that hangs.
        limits: how long ranks may wait for one another.
    """

    def __init__(
        self,
        config: RunConfig,
        collective: Collective,
        *,
        device: torch.device,
        data_world_size: int,
        saved_health: dict[str, Any] | None,
        checkpoint_written: Callable[[], bool],
        end: End,
        limits: WaitLimits,
    ) -> None:
        self._collective, self._checkpoint_written = collective, checkpoint_written
        self._run_dir, self._steps = Path(config.train.run_dir), config.train.steps
        self._leads = collective.rank == 0
        self._judge = StepJudge(
            collective,
            # Tensor-parallel ranks see the same data and so the same loss: each counts in part.
            loss_weight=data_world_size / collective.world_size,
            overflow_is_ordinary=config.train.precision == "fp16",
        )
        self._stack = ExitStack()
        self._stop = StopRequest(launched="RANK" in os.environ)
        self._control_files = ControlFiles(self._run_dir)
        self._time_limit = TimeLimit(
            config.train.time_limit_minutes,
            save_seconds=read_status(self._run_dir).get("save_seconds"),
        )
        self._watchdog = Watchdog(
            self._run_dir,
            rank=collective.rank,
            world_size=collective.world_size,
            timeout_seconds=config.health.hang_timeout_seconds,
            end=end,
            long_seconds=limits.phase,
            most_seconds=limits.verdict,
        )
        self._monitor = HealthMonitor(config.health, saved_health)
        self._replica_check = ReplicaCheck(collective, interval=config.health.replica_interval)
        self._stragglers = Stragglers(self._watchdog.host_of)
        self._work = WorkClock(device)
        self._stop_noticed_at: float | None = None
        self._step, self._loss = 0, torch.zeros(())
        self._judged: JudgedStep | None = None
        self._verdict = Verdict()
        self.consensus: Consensus
        """What all ranks agreed on in the latest step that has ended."""

    def __enter__(self) -> Self:
        if self._leads:
            forget(self._run_dir)
        # Before any rank writes its heartbeat, those of an earlier start must be gone.
        self._collective.barrier()
        self._stack.enter_context(self._stop)
        self._stack.enter_context(self._watchdog)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises LostRankError in place of an error of communication if a rank is found dead."""
        self._stack.__exit__(kind, error, trace)

    # -- signs of life and time ----------------------------------------------------------------

    def require_time_to_save(self) -> None:
        """Raise ConfigError if nothing could be saved before the time limit."""
        self._time_limit.require_useful()

    def mark(self, step: int, phase: Phase) -> None:
        """Note that this rank enters a phase of a step; cheap enough to be called often."""
        self._watchdog.mark(step, phase)
        if phase == "data":
            self._work.start()

    def own_work_done(self, step: int) -> None:
        """Note that this rank has come to where it exchanges gradients with the others."""
        self.mark(step, "backward")
        self._work.stop()

    def step_took(self, seconds: float) -> None:
        """Tell how long a step took with all that happened in it, so that the run stops in time."""
        self._time_limit.took_step(seconds)

    def rank_metrics(self) -> dict[str, Any]:
        """The slowest rank's work since the last call, by metric path; warns of a straggler."""
        return self._stragglers.metrics()

    # -- one step --------------------------------------------------------------------------------

    def stops_waiting(self, seconds: float) -> bool:
        """Whether to give up a wait for data, since a stop was asked for.

        A single process stops in order, as after a step. One of several ranks cannot agree with
        the others, who may already be in the step's collectives: it ends the run instead.

        Args:
            seconds: how long this rank has waited.

        Raises:
            WaitingForDataError: a rank of several was asked to stop, and its data did not come.
        """
        if self._collective.world_size == 1:
            return self._reach_consensus().stop is not None
        reason = self._stop.reason()
        if reason is None and self._leads and self._control_files.read().stop is not None:
            reason = "the file STOP"
        if reason is None:
            return False
        self._stop_noticed_at = self._stop_noticed_at or time.monotonic()
        if time.monotonic() - self._stop_noticed_at > WAIT_AFTER_STOP_SECONDS:
            raise WaitingForDataError(
                f"stopped by {reason} while rank {self._collective.rank} had waited {seconds:.0f} s"
                " for data; the last checkpoint is intact, start again to continue"
            )
        return False

    def begin_step(self, step: int, loss: Tensor) -> None:
        """The gradients of a step are there, and nothing has been agreed on yet.

        Args:
            step: steps taken before this one.
            loss: this rank's part of the mean loss, 0-dim.
        """
        self.mark(step, "agree")
        self._step, self._loss = step, loss
        self._judged, self._verdict = None, Verdict()

    def judge_step(self, norms: Mapping[str, Tensor]) -> Tensor:
        """1 if the step must be left out, else 0: float32, 0-dim, on the device. Collective.

        The answer is the same on all ranks, and no host waits for it. A backend asks when it has
        the gradient norms and before it changes anything.

        Args:
            norms: of the averaged gradients, by group kind, 0-dim; the same on all ranks.
        """
        self._judged = self._judge.judge(self._loss, norms, self._monitor.limits())
        self.mark(self._step, "step")  # the update may take longer than the agreement did
        return self._judged.left_out

    def read_verdict(self) -> Verdict:
        """What `judge_step` found of the latest step, which is counted when this is first called.

        Waits until the device has judged the step. A step that was not judged is healthy. Raises
        HealthError if the device did something else than the rules say.
        """
        judged, self._judged = self._judged, None
        if judged is None:
            return self._verdict
        found = judged.read()
        self._verdict = self._monitor.judge(
            loss=found.loss, norm=found.norm, faulty_ranks=found.faulty_ranks
        )
        if self._verdict.healthy == found.left_out:
            did = "left out" if found.left_out else "applied"
            raise HealthError(
                f"step {self._step + 1} was {did} on the device of rank {self._collective.rank}, "
                f"against the rules ({self._verdict.reason or 'it is healthy'}); the device "
                "computed something else than the host: start again to resume from the last "
                "checkpoint, without that host if it happens twice"
            )
        return self._verdict

    def end_step(self) -> None:
        """Reach the step's consensus. Collective; nothing waits for the device."""
        self.mark(self._step, "agree")
        self._reach_consensus()
        self.mark(self._step, "step")

    def _reach_consensus(self) -> Consensus:
        report = RankReport(
            request=self._control_files.read() if self._leads else Request(),
            time_is_up=self._leads and self._time_limit.reached(),
            written=self._checkpoint_written(),
            work_seconds=self._work.seconds(),
        )
        self.consensus = reach_consensus(self._collective, self._stop, report)
        self._stragglers.add(self.consensus.work_seconds)
        return self.consensus

    # -- health ----------------------------------------------------------------------------------

    @property
    def skip_reason(self) -> str | None:
        """Why the latest step whose verdict was read is left out; None if it was applied."""
        return self._verdict.reason

    @property
    def skipped_in_a_row(self) -> int:
        """Steps left out in a row, up to the latest one."""
        return self._monitor.streak

    @property
    def verdict_may_roll_back(self) -> bool:
        """Whether the coming step, if it is left out, makes the run return to a checkpoint."""
        return self._monitor.may_have_to_go_back

    @property
    def must_roll_back(self) -> bool:
        """Whether so many steps in a row were left out that the run must return to a checkpoint."""
        return self._monitor.must_go_back

    @property
    def may_roll_back(self) -> bool:
        """Whether the run may return once more, or has done so too often without progress."""
        return self._monitor.may_go_back

    @property
    def rollbacks(self) -> int:
        """Returns to a checkpoint since one was last added."""
        return self._monitor.rollbacks

    def rolled_back(self, saved_health: dict[str, Any] | None) -> None:
        """The run is as the checkpoint was whose `health_state()` is given."""
        self._monitor.went_back(saved_health)

    def swapped(self) -> None:
        """Forget the gradient norms so far: the triplets that train now may have other ones."""
        self._monitor.forget_norms()

    def health_state(self) -> dict[str, Any]:
        """JSON values for a checkpoint, from which a resumed run judges steps as this one does."""
        return self._monitor.state()

    def compare_replicas(self, step: int, replicated: Callable[[], Iterable[Replicated]]) -> None:
        """Compare what several ranks hold, if it is time. Collective. Raises HealthError."""
        self._replica_check.after_step(step, replicated)

    # -- files that people and schedulers read ----------------------------------------------------

    def record_incident(self, kind: str, step: int, **facts: Any) -> None:
        """Append a line to incidents.jsonl."""
        if self._leads:
            record(self._run_dir, kind, step, **facts)

    def checkpoint_added(self, step: int, seconds: float) -> None:
        """A checkpoint of `step` is complete; it took `seconds` from memory to the commit."""
        self._monitor.progressed()
        self._time_limit.took_save(seconds)
        if self._leads:
            longest = self._time_limit.save_seconds
            write_status(
                self._run_dir, "running", step=step, steps=self._steps, save_seconds=longest
            )

    def save_request_met(self) -> None:
        """Remove SAVE: the checkpoint that it asked for has been begun."""
        if self._leads:
            self._control_files.remove_save()

    def stop_request_met(self) -> None:
        """Remove STOP and SAVE: the run stops, and its next start shall go on."""
        if self._leads:
            self._control_files.remove_all()
