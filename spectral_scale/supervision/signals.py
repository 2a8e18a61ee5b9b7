"""Requests to stop that a single rank notices: a signal, or the end of its launcher."""

import signal
import time
from types import FrameType, TracebackType

from spectral_scale.config.stop_signals import STOP_SIGNALS
from spectral_scale.supervision.launcher_watch import LauncherWatch

ECHO_SECONDS = 2.0
"""A signal within this time of the first is the same request: on Ctrl-C the terminal signals the
whole group, and a launcher such as torchrun signals its workers again."""


class StopRequest:
    """Turns the first signal into a flag; a later signal ends the process at once.

    Use it as a context manager around the loop. The previous checkpoint stays valid either way.

    Args:
        launched: whether a launcher started this process. The end of the launcher then counts as
            a request to stop, so that no rank goes on as an orphan.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[int, object] = {}
        self._launcher = LauncherWatch() if launched else None

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup: a closed terminal is to change nothing
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
        if not self._received:
            self._received, self._received_at = number, now
        elif now - self._received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def received_number(self) -> int:
        """The signal this rank received; 0 if none."""
        return self._received

    @staticmethod
    def name_of(number: int) -> str:
        """The name of a signal: SIGTERM for 15."""
        return signal.Signals(number).name

    def reason(self) -> str | None:
        """Why this rank alone would stop: its signal or the end of its launcher."""
        if self._received:
            return self.name_of(self._received)
        return "the end of its launcher" if self.launcher_gone() else None

    def launcher_gone(self) -> bool:
        """Whether the launcher that started this process has ended."""
        return self._launcher is not None and self._launcher.gone()
