"""The training loop: accumulate, clip, step, boundary, log, evaluate, save, stop."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from spectral_scale.backends.base import StepStats
from spectral_scale.data.loader import Batch, StepBatch
from spectral_scale.engine.build import Run
from spectral_scale.engine.evaluate import Evaluation, evaluate, token_loss_sum
from spectral_scale.engine.measure import flops_per_token, memory, utilization
from spectral_scale.engine.run_folder import write_status
from spectral_scale.engine.stop import StopRequest
from spectral_scale.errors import SpectralScaleError
from spectral_scale.metrics.sinks import MetricsLog, NullLog
from spectral_scale.ops.keyed_random import keyed_seed
from spectral_scale.optim.groups import group_kind
from spectral_scale.optim.schedules import lr_factor
from spectral_scale.parallel.chunks import TensorChunk, whole

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Shows a person how the run goes; rank 0 only."""

    def advance(self, step: int, values: dict[str, Any]) -> None:
        """One step was taken; `values` is what was logged at it, often nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the loop ended."""

    step: int
    """Optimizer steps taken in all."""
    stopped: str | None
    """Why it ended early, or None if the run is complete."""
    first: Evaluation | None
    """The evaluation before this attempt's first step, if it began at step 0."""
    last: Evaluation | None
    """The latest evaluation of this attempt."""


class TrainingLoop:
    """Takes a run from its start step to its last, or to an agreed stop. All ranks run it."""

    def __init__(self, run: Run, log: MetricsLog | NullLog, progress: Progress | None) -> None:
        self.run, self.log, self.progress = run, log, progress
        self.flops_per_token = flops_per_token(run)
        train = run.config.train
        self.tokens_per_step = train.global_batch_size * run.config.model.sequence_length
        self.step, self.skipped_steps = run.start_step, run.skipped_steps
        self._saved_step: int | None = run.start_step or None
        self._evaluations: list[Evaluation] = []
        self._first: Evaluation | None = None
        self._timed_steps, self._timed_seconds = 0, 0.0
        self._ramp = 1.0
        self._latest: tuple[torch.Tensor, StepStats]

    def train(self) -> Outcome:
        """Run to the end. A stop request is honoured after the step in progress."""
        run, total = self.run, self.run.config.train.steps
        stopped = None
        with StopRequest(run.backend.collective) as stop:
            if self.step == 0:
                opening: dict[str, Any] = {}
                self._first = self._evaluate(opening)
                self.log.write(0, opening | memory(run))
            for batch in run.loader.steps(self.step, total):
                self._one_step(batch)
                if stop.agreed() and self.step < total:
                    stopped = stop.reason
                    break
        self._save()
        return Outcome(
            step=self.step,
            stopped=stopped,
            first=self._first,
            last=self._evaluations[-1] if self._evaluations else None,
        )

    def _one_step(self, batch: StepBatch) -> None:
        run, config = self.run, self.run.config
        started = time.perf_counter()
        self._set_learning_rates(batch.step - self.skipped_steps)
        loss = self._forward_backward(batch)
        stats = run.backend.step(clip_grad_norm=config.optimizer.clip_grad_norm)
        report = None
        if not stats.applied:
            self._count_skipped(stats)
        elif run.controller is not None:
            report = run.controller.after_step()
        self.step = batch.step + 1
        values: dict[str, Any] = {}
        if report is not None:
            values |= report.metrics()
        self._timed_steps += 1
        last = self.step == config.train.steps
        self._latest = loss, stats
        if last or self.step % config.metrics.log_interval == 0:
            mean_loss, norms = self._read_latest()
            self._timed_seconds += time.perf_counter() - started
            values |= self._step_values(mean_loss, norms)
        else:
            self._timed_seconds += time.perf_counter() - started
        if last or self.step % config.train.eval_interval == 0:
            self._evaluate(values)
            values |= memory(run)
        if self.step % config.checkpoint.interval == 0:
            values["checkpoint/save_seconds"] = self._save()
        if values:
            self.log.write(self.step, values)
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
            last = i == len(batch.micro_batches) - 1
            moved = Batch(*(t.to(device, non_blocking=True) for t in micro))
            with run.backend.accumulate(last=last):
                with torch.autocast(device.type, run.autocast, enabled=run.autocast is not None):
                    loss = token_loss_sum(run.forward, moved) / self.tokens_per_step
                run.backend.backward(loss)
            total += loss.detach()
        return total

    def _count_skipped(self, stats: StepStats) -> None:
        """The step's data is consumed; schedules and boundaries count applied steps only."""
        self.skipped_steps += 1
        if stats.overflowed:
            logger.warning(
                "step %d updated nothing: gradients overflowed in fp16 at loss scale %g",
                self.step + 1,
                stats.loss_scale,
            )

    def _set_learning_rates(self, step: int) -> None:
        """As `step`, the number of applied steps so far, has it."""
        factor = lr_factor(self.run.config.optimizer, step, self.run.config.train.steps)
        for group in self.run.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        controller = self.run.controller
        self._ramp = 1.0 if controller is None else controller.lr_factor()

    def _read_latest(self) -> tuple[float, dict[str, float]]:
        """Mean loss and gradient norms of the latest step, known finite. Collective; waits."""
        loss, stats = self._latest
        norms = {} if stats.overflowed else {k: float(n) for k, n in stats.grad_norms.items()}
        mean_loss = float(self.run.backend.data_collective.all_reduce_sum(loss.clone()))
        self._require_finite(mean_loss, norms)
        return mean_loss, norms

    def _require_finite(self, loss: float, norms: dict[str, float]) -> None:
        broken = [kind for kind, norm in norms.items() if not math.isfinite(norm)]
        if math.isfinite(loss) and not broken:
            return
        what = f"gradient norm of {', '.join(broken)}" if broken else "loss"
        raise SpectralScaleError(
            f"the {what} is not finite at step {self.step} (loss {loss}); nothing was saved since "
            f"step {self._saved_step or 0}; lower the learning rates or look at the data of that "
            "step, then start again to resume"
        )

    def _require_finite_state(self, chunks: list[TensorChunk]) -> None:
        """A step's own update can overflow though its loss was finite. Collective."""
        broken = next((c.name for c in chunks if not bool(c.tensor.isfinite().all())), None)
        agreed = self.run.backend.collective.agree(broken, what="not finite after the update")
        if agreed is not None:
            raise SpectralScaleError(
                f"step {self.step} was not saved: {agreed}; lower the learning rates, then start "
                f"again to resume from step {self._saved_step or 0}"
            )

    def _step_values(self, loss: float, norms: dict[str, float]) -> dict[str, Any]:
        run = self.run
        seconds = self._timed_seconds / self._timed_steps
        self._timed_steps, self._timed_seconds = 0, 0.0
        speed = self.tokens_per_step / seconds
        values: dict[str, Any] = {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700.0)),
            "train/tokens": self.step * self.tokens_per_step,
            "train/epoch": run.loader.epoch_of(self.step),
            "train/step_seconds": seconds,
            "train/tokens_per_second": speed,
        }
        if norms:
            values["train/grad_norm"] = math.sqrt(sum(n * n for n in norms.values()))
            values |= {f"train/grad_norm/{kind}": norm for kind, norm in norms.items()}
        if (loss_scale := self._latest[1].loss_scale) is not None:
            values["train/loss_scale"] = loss_scale
            values["train/skipped_steps"] = self.skipped_steps
        for group in run.optimizer.param_groups:
            lr = group["lr"] * (self._ramp if group["spectral"] else 1.0)
            values[f"train/lr/{group_kind(group['name'])}"] = lr
        if "train/lr/dense" in values:
            values["train/lr"] = values["train/lr/dense"]
        mfu = utilization(run, self.flops_per_token, speed)
        return values if mfu is None else values | {"train/mfu": mfu}

    def _evaluate(self, values: dict[str, Any]) -> Evaluation | None:
        run = self.run
        if run.validation is None:
            return None
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

    def _save(self) -> float:
        """Write a checkpoint of this step unless there is one; the seconds it took. Collective."""
        run = self.run
        if self._saved_step == self.step:
            return 0.0
        started = time.perf_counter()
        self._read_latest()  # never save a poisoned state over the last good one
        chunks = list(run.backend.state_chunks())
        if run.controller is not None:
            chunks += [whole(name, tensor) for name, tensor in run.controller.state_tensors()]
        self._require_finite_state(chunks)
        state = {
            "step": self.step,
            "applied_steps": self.step - self.skipped_steps,
            "skipped_steps": self.skipped_steps,
            "tokens": self.step * self.tokens_per_step,
        }
        run.checkpoints.save(self.step, chunks, state=state, identity=run.identity)
        self._saved_step = self.step
        if run.backend.collective.rank == 0:
            folder = Path(run.config.train.run_dir)
            write_status(folder, "running", step=self.step, steps=run.config.train.steps)
        return time.perf_counter() - started
