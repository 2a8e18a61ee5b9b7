"""Progress display: a bar with ETA on a terminal, otherwise an occasional line."""

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0

Item = TypeVar("Item")


class BarProgress:
    """A progress bar on standard error."""

    def __init__(self, *, start_step: int, steps: int) -> None:
        self._bar = tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._shown: dict[str, str] = {}

    def advance(self, step: int, values: dict[str, Any]) -> None:
        """Move by one step; remember the latest loss and perplexity."""
        if "train/loss" in values:
            self._shown["loss"] = f"{values['train/loss']:.3f}"
        if "validation/perplexity" in values:
            self._shown["val ppl"] = f"{values['validation/perplexity']:.1f}"
        if values:
            self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class LineProgress:
    """Lines on standard error, at evaluations and at most every 15 seconds between."""

    def __init__(self, *, start_step: int, steps: int) -> None:
        self._start_step, self._steps = start_step, steps
        self._begun = self._printed = time.monotonic()

    def advance(self, step: int, values: dict[str, Any]) -> None:
        """Print if something worth a line was logged."""
        now = time.monotonic()
        evaluated = "validation/perplexity" in values
        due = "train/loss" in values and now - self._printed >= SECONDS_BETWEEN_LINES
        if not (evaluated or due or step == self._steps):
            return
        self._printed = now
        left = (now - self._begun) / (step - self._start_step) * (self._steps - step)
        parts = [f"step {step}/{self._steps}"]
        if "train/loss" in values:
            parts.append(f"loss {values['train/loss']:.4f}")
        if evaluated:
            parts.append(f"validation perplexity {values['validation/perplexity']:.2f}")
        print(", ".join([*parts, f"{left:.0f} s left"]), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to close."""


def make_progress(*, start_step: int, steps: int, bar: bool) -> BarProgress | LineProgress:
    """A bar where standard error is a terminal and it is wanted, else lines."""
    kind = BarProgress if bar and sys.stderr.isatty() else LineProgress
    return kind(start_step=start_step, steps=steps)


def watch_batches(label: str) -> Callable[[Iterable[Item], int], Iterable[Item]]:
    """Hands batches on and shows a bar while they are read; nothing where there is no terminal."""

    def watch(batches: Iterable[Item], count: int) -> Iterable[Item]:
        return tqdm(batches, desc=label, total=count, unit="batch", leave=False, disable=None)

    return watch
