"""Which steps may be applied, and when a run must go back: the rules, without communication.

Every rank feeds in the numbers of the consensus and so comes to the same verdict.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from spectral_scale.config.schema_supervision import HealthConfig

_WINDOW_DIVISOR = 4
"""A window that is filled to a quarter is enough for a verdict."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a step is applied or left out."""

    reason: str | None = None
    """Why the step is left out; None if it is applied."""

    @property
    def healthy(self) -> bool:
        """Whether the step is applied."""
        return self.reason is None


class HealthMonitor:
    """Judges steps, and counts those left out in a row.

    Args:
        config: the rules.
        saved: `state()` of the run that wrote a checkpoint, so that judging goes on as it was.
    """

    def __init__(self, config: HealthConfig, saved: dict[str, Any] | None = None) -> None:
        self._config = config
        saved = saved or {}
        self._take_windows(saved)
        self.streak: int = saved.get("streak", 0)
        """Steps left out in a row, up to the present one."""
        self.rollbacks = 0
        """Returns to a checkpoint since one was last added."""

    def judge(self, *, loss: float, norm: float, faulty_ranks: tuple[int, ...]) -> Verdict:
        """Judge whether a step may be applied, and count it.

        Args:
            loss: the mean over all ranks.
            norm: the norm of the whole gradient.
            faulty_ranks: ranks that found something not finite.
        """
        verdict = self._verdict(loss, norm, faulty_ranks)
        if verdict.healthy:
            self.streak = 0
            if self._config.spike_sigmas:
                self._losses.append(loss)
                self._norms.append(norm)
        else:
            self.streak += 1
        return verdict

    def limits(self) -> tuple[float, float]:
        """The largest loss and gradient norm that are no spikes; infinite while none is known."""
        if not self._config.spike_sigmas:
            return math.inf, math.inf
        loss, norm = self._limit(self._losses), self._limit(self._norms)
        return math.inf if loss is None else loss, math.inf if norm is None else norm

    def forget_norms(self) -> None:
        """Start the window of gradient norms anew: other triplets train from now on."""
        self._norms.clear()

    @property
    def may_have_to_go_back(self) -> bool:
        """Whether one more step that is left out would be one too many."""
        return 0 < self._config.rollback_after <= self.streak + 1

    @property
    def must_go_back(self) -> bool:
        """Whether too many steps in a row were left out."""
        return 0 < self._config.rollback_after <= self.streak

    @property
    def may_go_back(self) -> bool:
        """Whether the run may return to a checkpoint once more."""
        return self.rollbacks < self._config.max_rollbacks

    def went_back(self, saved: dict[str, Any] | None) -> None:
        """Take over `state()` of the checkpoint that the run returned to."""
        self._take_windows(saved or {})
        self.streak = 0
        self.rollbacks += 1

    def progressed(self) -> None:
        """Count returns anew, since a checkpoint was added."""
        self.rollbacks = 0

    def state(self) -> dict[str, Any]:
        """JSON values from which another monitor goes on exactly as this one."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "streak": self.streak,
        }

    def _verdict(self, loss: float, norm: float, faulty_ranks: tuple[int, ...]) -> Verdict:
        if faulty_ranks:
            ranks = ", ".join(map(str, faulty_ranks))
            return Verdict(reason=f"loss or gradient not finite on rank {ranks}")
        if self._config.spike_sigmas:
            for what, value, window in (
                ("loss", loss, self._losses),
                ("gradient norm", norm, self._norms),
            ):
                if (limit := self._limit(window)) is not None and value > limit:
                    return Verdict(reason=f"{what} {value:.6g} above {limit:.6g}")
        return Verdict()

    def _limit(self, window: deque[float]) -> float | None:
        """The largest value that is no spike; None while too few are known."""
        if len(window) < max(2, math.ceil(self._config.spike_window / _WINDOW_DIVISOR)):
            return None
        spread = statistics.stdev(window)
        return statistics.fmean(window) + self._config.spike_sigmas * spread

    def _take_windows(self, saved: dict[str, Any]) -> None:
        size = self._config.spike_window
        self._losses: deque[float] = deque(saved.get("losses", []), maxlen=size)
        self._norms: deque[float] = deque(saved.get("norms", []), maxlen=size)
