"""What the training loop tells a person while it runs, and its caller when it has ended."""

from dataclasses import dataclass
from typing import Any, Protocol

from spectral_scale.engine.evaluate import Evaluation


class Progress(Protocol):
    """Shows a person how the run goes; rank 0 only."""

    def advance(self, step: int, values: dict[str, Any]) -> None:
        """One step was taken; `values` is what was logged at it, often nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the loop ended."""

    step: int
    """Steps taken in all; the last saved step if the loop stopped without saving."""
    stopped: str | None
    """Why the loop ended early; None if the run is complete."""
    requeue: bool = True
    """Whether a scheduler may start a stopped run again by itself."""
    saved: bool = True
    """Whether `step` was saved."""
    first: Evaluation | None
    """The evaluation before the run's first step, if this attempt began there."""
    last: Evaluation | None
    """The latest evaluation of this attempt."""
