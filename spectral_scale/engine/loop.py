"""The training loop: accumulate, clip, step, boundary, log, evaluate, save, stop."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from spectral_scale.backends.base import StepStats
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.data.loader import Batch, StepBatch
from spectral_scale.engine.build import Run
from spectral_scale.engine.evaluate import Evaluation, evaluate, token_loss_sum
from spectral_scale.engine.measure import memory
from spectral_scale.engine.saver import Saver
from spectral_scale.engine.step_log import StepLog
from spectral_scale.errors import HealthError
from spectral_scale.metrics.sinks import MetricsLog, NullLog
from spectral_scale.ops.keyed_random import keyed_seed
from spectral_scale.optim.schedules import lr_factor
from spectral_scale.supervision.data_record import data_of
from spectral_scale.supervision.incidents import record
from spectral_scale.supervision.lost_ranks import naming_lost_ranks
from spectral_scale.supervision.replica_check import check_replicas
from spectral_scale.supervision.status import write_status
from spectral_scale.supervision.supervisor import Supervisor
from spectral_scale.supervision.watchdog import End

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Shows a person how the run goes; rank 0 only."""

    def advance(self, step: int, values: dict[str, Any]) -> None:
        """One step was taken; `values` is what was logged at it, often nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the loop ended."""

    step: int
    """Steps taken in all; the last saved one if it stopped without saving."""
    stopped: str | None
    """Why it ended early, or None if the run is complete."""
    requeue: bool = True
    """Whether a scheduler may start it again by itself, if it was stopped."""
    saved: bool = True
    """Whether `step` was saved."""
    first: Evaluation | None
    """The evaluation before this attempt's first step, if it began at step 0."""
    last: Evaluation | None
    """The latest evaluation of this attempt."""


def exit_at_once(verdict: str, end_hanging: Callable[[], None]) -> NoReturn:
    """End this process without waiting for anything, since the main thread may wait for ever."""
    end_hanging()
    os._exit(1)


class TrainingLoop:
    """Takes a run from its start step to its last, or to an agreed stop. All ranks run it.

    Args:
        run: what to train.
        log: where measurements go.
        progress: for a person.
        end: ends the process of a run that hangs.
    """

    def __init__(
        self,
        run: Run,
        log: MetricsLog | NullLog,
        progress: Progress | None,
        end: End = exit_at_once,
    ) -> None:
        self.run, self.log, self.progress = run, log, progress
        self.step, self.skipped_steps = run.start_step, run.skipped_steps
        self.data_offset: int = run.saved_state.get("data_offset", 0)
        """Batches passed over: step s reads the batch of step s + data_offset."""
        self.steps = StepLog(run)
        background = run.config.checkpoint.async_save
        self.saver = Saver(run.checkpoints, run.identity, background=background)
        self.guard = Supervisor(run, self.saver, end)
        self._leads = run.backend.collective.rank == 0
        self._run_dir = Path(run.config.train.run_dir)
        self._saved_step: int | None = run.start_step or None
        self._evaluations: list[Evaluation] = []
        self._first: Evaluation | None = None
        self._ramp = 1.0

    def train(self) -> Outcome:
        """Run to the end. A stop request is honoured after the step in progress."""
        total = self.run.config.train.steps
        stopped = None
        with self.guard, naming_lost_ranks(self.guard.watchdog, self.saver):
            if self.step == 0:
                opening: dict[str, Any] = {}
                self._first = self._evaluate(opening)
                self.log.write(0, opening | memory(self.run))
            while self.step < total and stopped is None:
                stopped = self._steps_in_order(total)
            manner = "requeue" if stopped is None else self.guard.agreed.manner
            self._collect()
            if manner != "now":
                self._save()
                self._collect()
            if self._leads and stopped is not None:
                self.guard.switches.stopped()
        saved = self._saved_step == self.step
        return Outcome(
            step=self.step if saved else self._saved_step or 0,
            stopped=stopped,
            requeue=manner == "requeue",
            saved=saved,
            first=self._first,
            last=self._evaluations[-1] if self._evaluations else None,
        )

    def _steps_in_order(self, total: int) -> str | None:
        """Steps until the last, a stop (its reason) or a return to an earlier step (None)."""
        offset = self.data_offset
        self.guard.mark(self.step, "data")
        for batch in self.run.loader.steps(self.step + offset, total + offset):
            started = time.perf_counter()
            self._one_step(batch)
            self.guard.time_limit.took_step(time.perf_counter() - started)
            if self.guard.agreed.stop is not None and self.step < total:
                return self.guard.agreed.stop
            if self.guard.monitor.must_go_back:
                self._go_back(batch)
                return None
            self.guard.mark(self.step, "data")
        return None

    def _one_step(self, batch: StepBatch) -> None:
        run, config = self.run, self.run.config
        started = time.perf_counter()
        self._set_learning_rates()
        loss = self._forward_backward(batch)
        last = self.step + 1 == config.train.steps
        log_now = last or (self.step + 1) % config.metrics.log_interval == 0
        if run.gradient_filter is not None:
            run.gradient_filter.apply(measure=log_now)
        stats = self._update(loss)
        if run.gradient_filter is not None and stats.applied:
            run.gradient_filter.commit()
        values: dict[str, Any] = {}
        if not stats.applied:
            self._count_skipped(batch, stats, values)
        elif run.controller is not None:
            report = run.controller.after_step()
            if report is not None:
                self.guard.monitor.boundary()
                values |= report.metrics()
                if run.gradient_filter is not None:
                    run.gradient_filter.after_swap()
        self.step += 1
        self.steps.took(loss, stats)
        read = self.steps.read(self.step, self._saved_step or 0) if log_now else None
        self.steps.took_seconds(time.perf_counter() - started)
        if log_now:
            values |= self.steps.values(
                self.step, read, ramp=self._ramp, skipped=self.skipped_steps
            )
            values |= self.guard.stragglers.metrics()
            values |= {} if run.gradient_filter is None else run.gradient_filter.metrics()
        if last or self.step % config.train.eval_interval == 0:
            self._evaluate(values)
            values |= memory(run)
        self._compare_replicas()
        if values:
            self.log.write(self.step, values)  # before the save, which may be the last thing done
        self._save_in_turn()
        if self.progress is not None:
            self.progress.advance(self.step, values)

    def _forward_backward(self, batch: StepBatch) -> torch.Tensor:
        """Accumulate the step's gradients; the rank's share of the mean token loss, float64."""
        run = self.run
        device = run.backend.device
        if run.config.model.dropout > 0:
            # Keyed by step, so that dropout needs no saved generator state to resume exactly.
            key = (run.config.train.seed, "dropout", batch.step, run.backend.data_rank)
            torch.manual_seed(keyed_seed(*key))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for i, micro in enumerate(batch.micro_batches):
            self.guard.mark(self.step, "forward")
            last = i == len(batch.micro_batches) - 1
            moved = Batch(*(t.to(device, non_blocking=True) for t in micro))
            with run.backend.accumulate(last=last):
                with torch.autocast(device.type, run.autocast, enabled=run.autocast is not None):
                    loss = token_loss_sum(run.forward, moved) / self.steps.tokens_per_step
                if last:
                    self.guard.worked(self.step)
                run.backend.backward(loss)
            total += loss.detach()
        return total

    def _update(self, loss: torch.Tensor) -> StepStats:
        """Apply the step, unless a rank finds that it must not be; agree on all else, once."""
        config, guard = self.run.config, self.guard
        guard.mark(self.step, "agree")
        guard.begin_step()
        accept = partial(guard.accept, loss, entered=partial(guard.mark, self.step, "step"))
        stats = self.run.backend.step(
            clip_grad_norm=config.optimizer.clip_grad_norm,
            accept=accept if config.health.skip else None,
        )
        if not guard.has_agreed:
            guard.agree()
        guard.mark(self.step, "step")
        return stats

    def _count_skipped(self, batch: StepBatch, stats: StepStats, values: dict[str, Any]) -> None:
        """The step's data is consumed; schedules and boundaries count applied steps only."""
        self.skipped_steps += 1
        if stats.overflowed:
            logger.warning(
                "step %d updated nothing: gradients overflowed in fp16 at loss scale %g",
                self.step + 1,
                stats.loss_scale,
            )
            return
        reason = self.guard.verdict.reason or "the host skipped it"
        values["health/skipped"] = reason
        if self._leads:
            facts = data_of(self.run.loader, batch.step)
            logger.warning(
                "step %d is left out: %s; its batch holds samples %s",
                self.step + 1,
                reason,
                facts["samples"],
            )
            record(self._run_dir, "skipped step", self.step + 1, reason=reason, **facts)

    def _go_back(self, batch: StepBatch) -> None:
        """Return to the last checkpoint, and pass over the data read since. Collective."""
        run, monitor = self.run, self.guard.monitor
        self._collect()
        self.guard.mark(self.step, "save")
        bad = f"{monitor.streak} steps in a row up to step {self.step} could not be applied"
        reader = self._checkpoint_before_the_streak() if monitor.may_go_back else None
        if reader is None:
            samples = data_of(run.loader, batch.step)["samples"]
            why = "there is no checkpoint to go back to"
            if not monitor.may_go_back:
                why = f"going back {monitor.rollbacks} times did not help"
            raise HealthError(
                f"{bad} ({self.guard.verdict.reason}), and {why}; the last batch held samples "
                f"{samples}; look at {self._run_dir / 'incidents.jsonl'}, lower the learning "
                "rates, and start again"
            )
        run.load(reader)
        passed = self.step - reader.step
        self.data_offset += passed
        if self._leads:
            message = f"{bad}; back to step {reader.step}, passing over {passed} batches"
            logger.warning(message)
            record(self._run_dir, "rollback", self.step, to_step=reader.step, passed_over=passed)
        self.step = self._saved_step = reader.step
        self.skipped_steps = reader.state.get("skipped_steps", 0)
        monitor.went_back(reader.state.get("health"))
        self.log.go_back(self.step)

    def _checkpoint_before_the_streak(self) -> CheckpointReader | None:
        """The newest one saved in turn, so that where a run goes back to does not depend on when
        it was stopped; else the newest at all."""
        healthy = self.step - self.guard.monitor.streak
        interval, checkpoints = self.run.config.checkpoint.interval, self.run.checkpoints
        in_turn = checkpoints.latest_good(lambda s: s <= healthy and s % interval == 0)
        return in_turn or checkpoints.latest_good(lambda s: s <= healthy)

    def _set_learning_rates(self) -> None:
        """As the number of applied steps so far has it."""
        applied = self.step - self.skipped_steps
        factor = lr_factor(self.run.config.optimizer, applied, self.run.config.train.steps)
        for group in self.run.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        controller = self.run.controller
        self._ramp = 1.0 if controller is None else controller.lr_factor()

    def _compare_replicas(self) -> None:
        """After the first step of an attempt, and then now and again."""
        interval, collective = self.run.config.health.replica_interval, self.run.backend.collective
        first = self.step == self.run.start_step + 1
        if collective.world_size == 1 or not interval or not (first or self.step % interval == 0):
            return
        count = check_replicas(self.run.backend.replicated(), collective)
        if first:
            logger.info("%d tensors are held by several ranks and equal on all of them", count)

    def _evaluate(self, values: dict[str, Any]) -> Evaluation | None:
        run = self.run
        if run.validation is None:
            return None
        self.guard.mark(self.step, "evaluation")
        started = time.perf_counter()
        result = evaluate(
            run.forward,
            run.validation,
            device=run.backend.device,
            collective=run.backend.data_collective,
            autocast=run.autocast,
        )
        self._evaluations.append(result)
        values["validation/loss"] = result.loss
        values["validation/perplexity"] = result.perplexity
        values["validation/seconds"] = time.perf_counter() - started
        return result

    def _save_in_turn(self) -> None:
        """Save if it is time or somebody asked, but nothing amid steps that were left out."""
        if self.guard.agreed.written:
            self._collect()
        due = self.step % self.run.config.checkpoint.interval == 0
        if (due and not self.guard.monitor.streak) or self.guard.agreed.save:
            self.log.write(self.step, {"checkpoint/save_seconds": self._save()})
        if self.guard.agreed.save and self._leads:
            self.guard.switches.saved()

    def _save(self) -> float:
        """Begin to write a checkpoint of this step unless there is one; the seconds that training
        waited. Collective."""
        run = self.run
        if self._saved_step == self.step:
            return 0.0
        self.guard.mark(self.step, "save")
        started = time.perf_counter()
        self.steps.read(self.step, self._saved_step or 0)  # nothing poisoned over the last good one
        chunks = run.state_chunks()
        self.steps.require_finite(chunks, self.step, self._saved_step or 0)
        state = {
            "step": self.step,
            "applied_steps": self.step - self.skipped_steps,
            "skipped_steps": self.skipped_steps,
            "data_offset": self.data_offset,
            "tokens": self.step * self.steps.tokens_per_step,
            "health": self.guard.monitor.state(),
        }
        self._collect()
        self.saver.save(self.step, chunks, state)
        if not self.saver.background:
            self._saved(self.step)
        return time.perf_counter() - started

    def _collect(self) -> None:
        """Take note of a save in the background, waiting for it if it is not done. Collective."""
        step = self.saver.finish()
        if step is not None:
            self._saved(step)

    def _saved(self, step: int) -> None:
        self._saved_step = step
        self.guard.monitor.progressed()
        self.guard.time_limit.took_save(self.saver.last_seconds)
        if self._leads:
            total, seconds = self.run.config.train.steps, self.guard.time_limit.save_seconds
            write_status(self._run_dir, "running", step=step, steps=total, save_seconds=seconds)
