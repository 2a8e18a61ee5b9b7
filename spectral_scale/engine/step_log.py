"""What is logged of a step: loss, norms, learning rates and speed, known finite."""

import math
from typing import Any

import torch

from spectral_scale.backends.base import StepStats
from spectral_scale.engine.build import Run
from spectral_scale.engine.measure import flops_per_token, utilization
from spectral_scale.errors import SpectralScaleError
from spectral_scale.optim.groups import group_kind
from spectral_scale.parallel.chunks import TensorChunk


class StepLog:
    """Keeps the latest step and the time since the last logged one; reads them when asked.

    Args:
        run: whose steps they are.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._flops_per_token = flops_per_token(run)
        train = run.config.train
        self.tokens_per_step = train.global_batch_size * run.config.model.sequence_length
        self._steps, self._seconds = 0, 0.0
        self._loss: torch.Tensor | None = None
        self._stats: StepStats

    def took(self, loss: torch.Tensor, stats: StepStats) -> None:
        """A step's share of the loss and its outcome; nothing is read yet."""
        self._loss, self._stats = loss, stats
        self._steps += 1

    def took_seconds(self, seconds: float) -> None:
        """What the step took, with the wait for its numbers if they were read."""
        self._seconds += seconds

    def read(self, step: int, saved_step: int) -> tuple[float, dict[str, float]] | None:
        """Mean loss and gradient norms of the latest step; None if it was refused. Collective.

        Raises SpectralScaleError on all ranks alike if they are not finite.
        """
        if self._loss is None or (not self._stats.applied and not self._stats.overflowed):
            return None
        stats, collective = self._stats, self._run.backend.data_collective
        norms = {} if stats.overflowed else {k: float(n) for k, n in stats.grad_norms.items()}
        loss = float(collective.all_reduce_sum(self._loss.clone()))
        broken = [kind for kind, norm in norms.items() if not math.isfinite(norm)]
        if math.isfinite(loss) and not broken:
            return loss, norms
        what = f"gradient norm of {', '.join(broken)}" if broken else "loss"
        raise SpectralScaleError(
            f"the {what} is not finite at step {step} (loss {loss}); nothing was saved since "
            f"step {saved_step}; lower the learning rates or look at the data of that "
            "step, then start again to resume"
        )

    def require_finite(self, chunks: list[TensorChunk], step: int, saved_step: int) -> None:
        """A step's own update can overflow though its loss was finite. Collective.

        Raises SpectralScaleError on all ranks alike.
        """
        broken = next((c.name for c in chunks if not bool(c.tensor.isfinite().all())), None)
        agreed = self._run.backend.collective.agree(broken, what="not finite after the update")
        if agreed is not None:
            raise SpectralScaleError(
                f"step {step} was not saved: {agreed}; lower the learning rates, then start "
                f"again to resume from step {saved_step}"
            )

    def values(
        self, step: int, read: tuple[float, dict[str, float]] | None, *, ramp: float, skipped: int
    ) -> dict[str, Any]:
        """The values of a logged step, by metric path.

        Args:
            step: steps taken.
            read: of `read`.
            ramp: factor on the spectral groups' learning rates.
            skipped: steps so far that updated nothing.
        """
        seconds = self._seconds / self._steps
        self._steps, self._seconds = 0, 0.0
        speed = self.tokens_per_step / seconds
        values: dict[str, Any] = {
            "train/tokens": step * self.tokens_per_step,
            "train/epoch": self._run.loader.epoch_of(step),
            "train/step_seconds": seconds,
            "train/tokens_per_second": speed,
        }
        if read is not None:
            values = _loss_values(*read) | values
        if self._stats.loss_scale is not None:
            values["train/loss_scale"] = self._stats.loss_scale
        if skipped or self._stats.loss_scale is not None:
            values["train/skipped_steps"] = skipped
        for group in self._run.optimizer.param_groups:
            lr = group["lr"] * (ramp if group["spectral"] else 1.0)
            values[f"train/lr/{group_kind(group['name'])}"] = lr
        if "train/lr/dense" in values:
            values["train/lr"] = values["train/lr/dense"]
        mfu = utilization(self._run, self._flops_per_token, speed)
        return values if mfu is None else values | {"train/mfu": mfu}


def _loss_values(loss: float, norms: dict[str, float]) -> dict[str, Any]:
    values = {"train/loss": loss, "train/perplexity": math.exp(min(loss, 700.0))}
    if norms:
        values["train/grad_norm"] = math.sqrt(sum(n * n for n in norms.values()))
        values |= {f"train/grad_norm/{kind}": norm for kind, norm in norms.items()}
    return values
