"""The training loop: accumulate, clip, step, swap, log, evaluate, save, stop."""

import logging
import time
from typing import Any

import torch

from spectral_scale.backends.base import StepStats
from spectral_scale.backends.limits import wait_limits
from spectral_scale.data.loader import StepBatch
from spectral_scale.data.to_device import BatchMover
from spectral_scale.engine.evaluations import Evaluations
from spectral_scale.engine.late_verdict import LateVerdicts
from spectral_scale.engine.learning_rate import LearningRates, no_ramp
from spectral_scale.engine.measure import memory
from spectral_scale.engine.outcome import Outcome, Progress
from spectral_scale.engine.rollback import way_back
from spectral_scale.engine.run import Run
from spectral_scale.engine.saver import Saver
from spectral_scale.engine.step_log import StepLog, StepNumbers
from spectral_scale.methods.base import FollowsOpenSteps
from spectral_scale.metrics.sinks import MetricsLog, NullLog
from spectral_scale.models.loss import token_loss_sum
from spectral_scale.ops.keyed_random import keyed_seed
from spectral_scale.supervision.finite_check import require_finite_state, require_finite_step
from spectral_scale.supervision.supervisor import Supervisor
from spectral_scale.supervision.watchdog import End, exit_at_once

logger = logging.getLogger(__name__)


class TrainingLoop:
    """Takes a run from its start step to its last, or to an agreed stop. All ranks run it.

    Args:
        run: the run to train.
        log: where measurements go.
        progress: shows a person how the run goes; None on other ranks than 0.
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
        self.step = run.start_step
        self.data_offset: int = run.saved_state.get("data_offset", 0)
        """Batches passed over: step s reads the batch of step s + data_offset."""
        config, controller = run.config, run.controller
        self.rates = LearningRates(
            run.optimizer,
            config.optimizer,
            total_steps=config.train.steps,
            ramp=no_ramp if controller is None else controller.lr_factor,
        )
        self.step_log = StepLog(run, self.rates)
        self.saver = Saver(run.checkpoints, run.identity, background=config.checkpoint.async_save)
        self.supervisor = Supervisor(
            config,
            run.backend.collective,
            device=run.backend.device,
            data_world_size=run.backend.data_world_size,
            saved_health=run.saved_state.get("health"),
            checkpoint_written=lambda: self.saver.written,
            end=end,
            limits=wait_limits(run.resolved, run.backend.device.type),
        )
        self.verdicts = LateVerdicts(run, self.supervisor, log)
        self.evaluations = Evaluations(run, self.supervisor)
        self._to_device = BatchMover(run.backend.device)
        self._leads = run.backend.collective.rank == 0
        self._saved_step: int | None = run.start_step or None

    @property
    def skipped_steps(self) -> int:
        """Steps that updated nothing, up to the latest one whose verdict is known."""
        return self.verdicts.skipped_steps

    def train(self) -> Outcome:
        """Run to the end. A stop request is honoured after the step in progress."""
        with self.supervisor:
            try:
                if self.step == 0:
                    self._measure_untrained()
                stopped = self._train_to_the_end_or_a_stop()
                manner = "requeue" if stopped is None else self.supervisor.consensus.manner
                self._finish_save()
                if manner != "now":
                    self._save()
                    self._finish_save()
                if stopped is not None:
                    self.supervisor.stop_request_met()
            except BaseException:
                # Before the supervisor looks for a lost rank, which takes seconds itself.
                self.saver.abandon()
                raise
        saved = self._saved_step == self.step
        return Outcome(
            step=self.step if saved else self._saved_step or 0,
            stopped=stopped,
            requeue=manner == "requeue",
            saved=saved,
            first=self.evaluations.first,
            last=self.evaluations.last,
        )

    def _measure_untrained(self) -> None:
        """Evaluate and measure memory before the first step of a fresh run."""
        values: dict[str, Any] = {}
        self.evaluations.measure(0, values)
        self.log.write(0, values | memory(self.run))

    def _train_to_the_end_or_a_stop(self) -> str | None:
        """Train until the last step (None) or an agreed stop (its reason)."""
        while self.step < self.run.config.train.steps:
            stopped = self._steps_in_order()
            self._close_step()
            if stopped is not None:
                return stopped
        return None

    def _steps_in_order(self) -> str | None:
        """Steps until the last, a stop (its reason) or a return to an earlier step (None)."""
        total, offset = self.run.config.train.steps, self.data_offset
        self.supervisor.mark(self.step, "data")
        steps = self.run.loader.steps(
            self.step + offset, total + offset, while_waiting=self.supervisor.stops_waiting
        )
        for batch in steps:
            started = time.perf_counter()
            self._one_step(batch)
            self.supervisor.step_took(time.perf_counter() - started)
            # A stop comes before a rollback: the next start finds the same streak and goes back.
            if self.supervisor.consensus.stop is not None and self.step < total:
                return self.supervisor.consensus.stop
            if self.supervisor.must_roll_back:
                self._roll_back(batch)
                return None
            self.supervisor.mark(self.step, "data")
        # Steps left mean that the wait for data was given up: a stop came meanwhile.
        return self.supervisor.consensus.stop if self.step < total else None

    def _one_step(self, batch: StepBatch) -> None:
        run, config = self.run, self.run.config
        started, computed = time.perf_counter(), time.process_time()
        last = self.step + 1 == config.train.steps
        log_now = last or (self.step + 1) % config.metrics.log_interval == 0
        evaluate_now = last or (self.step + 1) % config.train.eval_interval == 0
        save_now = (self.step + 1) % config.checkpoint.interval == 0
        values: dict[str, Any] = {}
        wait = not (log_now or evaluate_now or save_now)
        loss, stats = self._train_on(batch, values, measure=log_now, wait=wait)
        self.step += 1
        self.step_log.add(loss, stats)
        numbers = self._read_finite() if log_now else None
        # After the numbers are read: only then has the device finished the step.
        computed = time.process_time() - computed
        self.step_log.add_seconds(time.perf_counter() - started, computed)
        if log_now:
            values |= self.step_log.metrics(self.step, numbers, skipped=self.skipped_steps)
            values |= self.supervisor.rank_metrics()
            values |= {} if run.gradient_filter is None else run.gradient_filter.metrics()
        if evaluate_now:
            self.evaluations.measure(self.step, values)
            values |= memory(run)
        # Before the save, so that no checkpoint holds a replica that differs.
        self.supervisor.compare_replicas(self.step, run.backend.replicated)
        if values:
            self.log.write(self.step, values)  # before the save, which may be the last thing done
        self._save_in_turn()
        if self.progress is not None:
            self.progress.advance(self.step, values)

    def _train_on(
        self, batch: StepBatch, values: dict[str, Any], *, measure: bool, wait: bool
    ) -> tuple[torch.Tensor, StepStats]:
        """Take one optimizer step, or leave it out; the order of these calls is the method's.

        Args:
            batch: this rank's data.
            values: receives what is to be logged of a swap or a skipped step.
            measure: whether the gradient filter measures what it does.
            wait: whether nothing that follows in this step needs its verdict.
        """
        run = self.run
        loss = self._forward_backward(batch)
        self._close_step()  # the step before, while the device works on this one
        self.saver.before_update()
        self.rates.set_for_step(self.step - self.skipped_steps)
        if run.gradient_filter is not None:
            run.gradient_filter.apply(measure=measure)  # before norms are taken for clipping
        wait = wait and self.verdicts.may_wait()
        stats = self._update(loss)
        stats = self.verdicts.add(self.step + 1, batch, stats, values, wait=wait)
        if stats.applied is None:
            self._follow_open_step(stats)
            return loss, stats
        if not stats.applied:
            return loss, stats
        if run.gradient_filter is not None:
            run.gradient_filter.commit()
        report = None if run.controller is None else run.controller.after_step()
        if report is not None:
            values |= report.metrics()
            self.supervisor.swapped()
            if run.gradient_filter is not None:
                run.gradient_filter.after_swap()  # of the triplets that train from now on
        return loss, stats

    def _forward_backward(self, batch: StepBatch) -> torch.Tensor:
        """Accumulate the step's gradients; this rank's part of the mean token loss, float64."""
        run = self.run
        device = run.backend.device
        if run.config.model.dropout > 0:
            # Keyed by step, so that dropout needs no saved generator state to resume exactly.
            key = (run.config.train.seed, "dropout", batch.step, run.backend.data_rank)
            torch.manual_seed(keyed_seed(*key))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for i, moved in enumerate(self._to_device.move(batch.micro_batches)):
            self.supervisor.mark(self.step, "forward")
            last = i == len(batch.micro_batches) - 1
            with run.backend.accumulate(last=last):
                with torch.autocast(device.type, run.autocast, enabled=run.autocast is not None):
                    loss = token_loss_sum(run.forward, *moved) / run.loader.tokens_per_step
                if last:
                    self.supervisor.own_work_done(self.step)
                run.backend.backward(loss)
            total += loss.detach()
        return total

    def _update(self, loss: torch.Tensor) -> StepStats:
        """Apply the step unless a rank finds that it must not be, and agree with all ranks."""
        config, supervisor = self.run.config, self.supervisor
        supervisor.begin_step(self.step, loss)
        stats = self.run.backend.step(
            clip_grad_norm=config.optimizer.clip_grad_norm,
            judge=supervisor.judge_step if config.health.skip else None,
        )
        supervisor.end_step()
        return stats

    def _follow_open_step(self, stats: StepStats) -> None:
        """What the method does after a step of which only the device knows whether it counts."""
        if isinstance(self.run.controller, FollowsOpenSteps):
            self.run.controller.after_step(stats.left_out)

    def _close_step(self) -> None:
        """Read the verdict of the step before, if it was left open."""
        applied = self.verdicts.close()
        if applied is not None:
            self.step_log.close(applied=applied)

    def _read_finite(self) -> StepNumbers | None:
        """Read the latest step's loss and norms. Collective. Raises if they are not finite."""
        numbers = self.step_log.read()
        if numbers is not None:
            require_finite_step(
                numbers.loss,
                numbers.grad_norms,
                step=self.step,
                saved_step=self._saved_step or 0,
            )
        return numbers

    # -- returning to a checkpoint ---------------------------------------------------------------

    def _roll_back(self, batch: StepBatch) -> None:
        """Return to the last checkpoint, and pass over the data read since. Collective."""
        run, supervisor = self.run, self.supervisor
        self._finish_save()  # it may be the checkpoint to go back to
        supervisor.mark(self.step, "save")
        bad = (
            f"{supervisor.skipped_in_a_row} steps in a row up to step {self.step} "
            "could not be applied"
        )
        reader = way_back(run, supervisor, bad, step=self.step, data_step=batch.step)
        run.load(reader)
        passed = self.step - reader.step
        self.data_offset += passed
        if self._leads:
            logger.warning("%s; back to step %d, passing over %d batches", bad, reader.step, passed)
            supervisor.record_incident(
                "rollback", self.step, to_step=reader.step, passed_over=passed
            )
        self.step = self._saved_step = reader.step
        self.verdicts.skipped_steps = reader.state.get("skipped_steps", 0)
        supervisor.rolled_back(reader.state.get("health"))
        self.log.go_back(self.step)

    # -- saving ----------------------------------------------------------------------------------

    def _save_in_turn(self) -> None:
        """Save if it is time or somebody asked, but nothing amid steps that were left out."""
        asked, written = self.supervisor.consensus.save, self.supervisor.consensus.written
        if written:  # on all ranks, so that none waits here
            self._finish_save()
        due = self.step % self.run.config.checkpoint.interval == 0
        if (due and not self.supervisor.skipped_in_a_row) or asked:
            self.log.write(self.step, {"checkpoint/save_seconds": self._save()})
        if asked:
            self.supervisor.save_request_met()

    def _save(self) -> float:
        """Begin to write a checkpoint of this step unless there is one. Collective.

        Returns the seconds that training waited.
        """
        run = self.run
        if self._saved_step == self.step:
            return 0.0
        self.supervisor.mark(self.step, "save")
        started = time.perf_counter()
        self._close_step()
        # Neither a step that is not finite nor its tensors may replace the last good checkpoint.
        self._read_finite()
        chunks = run.state_chunks()
        collective, saved_step = run.backend.collective, self._saved_step or 0
        require_finite_state(chunks, collective, step=self.step, saved_step=saved_step)
        state = {
            "step": self.step,
            "applied_steps": self.step - self.skipped_steps,
            "skipped_steps": self.skipped_steps,
            "data_offset": self.data_offset,
            "tokens": self.step * run.loader.tokens_per_step,
            "health": self.supervisor.health_state(),
        }
        self._finish_save()  # saves never pile up
        self.saver.save(self.step, chunks, state)
        if not self.saver.background:
            self._note_saved(self.step)
        return time.perf_counter() - started

    def _finish_save(self) -> None:
        """Wait for a save in the background, if there is one, and take note of it. Collective."""
        step = self.saver.finish()
        if step is not None:
            self._note_saved(step)

    def _note_saved(self, step: int) -> None:
        self._saved_step = step
        self.supervisor.checkpoint_added(step, self.saver.last_seconds)
