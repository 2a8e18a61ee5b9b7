"""What is logged of a step: loss, gradient norms, learning rates and speed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from spectral_scale.backends.base import StepStats
from spectral_scale.engine.learning_rate import LearningRates
from spectral_scale.engine.measure import flops_per_token, utilization
from spectral_scale.engine.run import Run


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """The numbers of one step, read from the device."""

    loss: float
    """Mean loss over all ranks."""
    grad_norms: Mapping[str, float]
    """Norms of the averaged gradients by group kind; empty if they overflowed in fp16."""


class StepLog:
    """Keeps the latest step's outcome and the time since a step was logged, until asked for them.

    Args:
        run: the run whose steps are logged.
        rates: the learning rates of its groups.
    """

    def __init__(self, run: Run, rates: LearningRates) -> None:
        self._run, self._rates = run, rates
        self._flops_per_token = flops_per_token(run)
        self._steps, self._seconds, self._processor_seconds = 0, 0.0, 0.0
        self._loss: torch.Tensor | None = None
        self._stats: StepStats

    def add(self, loss: torch.Tensor, stats: StepStats) -> None:
        """Keep a step's outcome; nothing is read from the device yet.

        Args:
            loss: this rank's part of the mean loss, 0-dim.
            stats: the outcome of the step.
        """
        self._loss, self._stats = loss, stats
        self._steps += 1

    def close(self, *, applied: bool) -> None:
        """Whether the latest step was applied, which `add` could not know."""
        self._stats = replace(self._stats, applied=applied, left_out=None)

    def add_seconds(self, seconds: float, processor_seconds: float) -> None:
        """Add what the step took, with the wait for its numbers if they were read, and what this
        process computed in it on all of its threads."""
        self._seconds += seconds
        self._processor_seconds += processor_seconds

    def read(self) -> StepNumbers | None:
        """Read the latest step's numbers; None if the step was refused. Collective."""
        if self._loss is None or (not self._stats.applied and not self._stats.overflowed):
            return None
        stats, collective = self._stats, self._run.backend.data_collective
        norms = {} if stats.overflowed else stats.grad_norms
        loss = collective.all_reduce_sum(self._loss.clone())
        numbers = torch.stack([loss, *(norm.to(loss) for norm in norms.values())])
        mean, *found = numbers.tolist()  # one wait for the device
        return StepNumbers(loss=mean, grad_norms=dict(zip(norms, found, strict=True)))

    def metrics(self, step: int, numbers: StepNumbers | None, *, skipped: int) -> dict[str, Any]:
        """The values of a logged step, by metric path; the clock starts anew.

        Args:
            step: steps taken.
            numbers: what `read` returned.
            skipped: steps so far that updated nothing.
        """
        seconds = self._seconds / self._steps
        computed = self._processor_seconds / self._steps
        self._steps, self._seconds, self._processor_seconds = 0, 0.0, 0.0
        loader = self._run.loader
        speed = loader.tokens_per_step / seconds
        values: dict[str, Any] = {
            "train/tokens": step * loader.tokens_per_step,
            "train/epoch": loader.epoch_of(step),
            "train/step_seconds": seconds,
            "train/processor_seconds": computed,
            "train/tokens_per_second": speed,
        }
        if numbers is not None:
            values = _loss_metrics(numbers) | values
        if self._stats.loss_scale is not None:
            values["train/loss_scale"] = self._stats.loss_scale
        if skipped or self._stats.loss_scale is not None:
            values["train/skipped_steps"] = skipped
        values |= self._rates.metrics()
        mfu = utilization(self._run, self._flops_per_token, speed)
        return values if mfu is None else values | {"train/mfu": mfu}


def _loss_metrics(numbers: StepNumbers) -> dict[str, Any]:
    loss, norms = numbers.loss, numbers.grad_norms
    values = {"train/loss": loss, "train/perplexity": math.exp(min(loss, 700.0))}
    if norms:
        values["train/grad_norm"] = math.sqrt(sum(n * n for n in norms.values()))
        values |= {f"train/grad_norm/{kind}": norm for kind, norm in norms.items()}
    return values
