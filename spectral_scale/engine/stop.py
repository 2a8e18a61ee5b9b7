"""Stopping early: a request on any rank becomes one decision of all ranks."""

import signal
import time
from types import FrameType, TracebackType

import torch

from spectral_scale.parallel.collective import Collective

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO_SECONDS = 2.0
"""A signal this soon after the first is the same request: on Ctrl-C the terminal signals the whole
group and a launcher such as torchrun signals its workers again."""


class StopRequest:
    """Turns the first signal into a flag; one that comes later ends the process at once.

    Use as a context manager around the loop. The previous checkpoint stays valid either way.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._received: str | None = None
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signal.Signals(number).name, now
        elif now - self._received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective; called between steps."""
        if self._collective.world_size == 1:
            return self._received is not None
        flag = torch.tensor([int(self._received is not None)])
        return bool(self._collective.all_reduce_sum(flag).item())

    @property
    def reason(self) -> str:
        """The signal this rank received, or that another one did."""
        return self._received or "a signal to another rank"
