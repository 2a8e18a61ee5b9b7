"""Ends a run whose rank died or hangs: names it, leaves stack traces, and lets go of the GPUs.

A thread beside the loop. It works while the main thread waits in a collective for ever, which is
what the others do when one rank is gone.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn, Self

from spectral_scale.supervision.heartbeat import (
    DEAF_SECONDS,
    Beat,
    Heartbeat,
    Listener,
    Phase,
    known_dead,
    process_of,
)

logger = logging.getLogger(__name__)

End = Callable[[str, Callable[[], None]], NoReturn]
"""Ends this process: notes the verdict, then calls the second, which ends hanging ranks, since a
launcher that sees one of them end may kill all others at once."""

UNEVEN: tuple[Phase, ...] = ("start", "step", "evaluation", "save")
"""Phases that may take long now and then: decompositions and swaps, evaluation, saving."""
LONG_SECONDS = 600.0
"""They may, and so may any phase the first time (compilation, the first batch)."""
PATIENCE = 10.0
"""Any phase may take so many times the longest so far, and at least the timeout."""
MAX_BEAT_SECONDS = 2.0
TELL_BEATS = 3
"""Beats that a verdict stays up before its writer leaves, so that all others read it."""
KILL_AFTER_SECONDS = 2.0
"""Time for a hanging rank on this host to write its stack traces, then it is killed."""
GRACE_SECONDS = 3.0
BLAME_SECONDS = 10.0
"""After a failed collective: how long to look for the rank that caused it."""


class Watchdog:
    """Use as a context manager around the loop; call `mark` wherever a rank moves on.

    Args:
        run_dir: the run folder, which all ranks see.
        rank: this process.
        world_size: all of them.
        timeout_seconds: silence that counts as death; 0 writes heartbeats and watches nothing.
        end: called in the thread with the verdict and what to call once that is noted; it ends the
            process.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        end: End,
    ) -> None:
        self._run_dir, self._world_size = run_dir, world_size
        self._timeout, self._end = timeout_seconds, end
        self._interval = min(MAX_BEAT_SECONDS, (timeout_seconds or 60.0) / 10)
        self._heart = Heartbeat(run_dir, rank)
        others = range(1, world_size) if rank == 0 else [0]
        self._listener = Listener(run_dir, others)
        self._longest: dict[Phase, float] = {}
        self._moved_at = time.monotonic()
        self._stacks_path = run_dir / "logs" / f"stacks_rank_{rank:05d}.txt"
        self._stacks: IO[str] | None = None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def mark(self, step: int, phase: Phase) -> None:
        """This rank enters a phase of a step; the phase before it has come to its end."""
        now, before = time.monotonic(), self._heart.beat.phase
        self._longest[before] = max(self._longest.get(before, 0.0), now - self._moved_at)
        self._heart.mark(step, phase)
        self._moved_at = now

    def __enter__(self) -> Self:
        self._stacks = open(self._stacks_path, "a", encoding="utf-8")
        faulthandler.enable(file=self._stacks)  # of SIGABRT, too, even where the GIL is held
        self._moved_at = time.monotonic()
        self._heart.write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving.set()
        self._thread.join(5.0)
        if error is None:
            self._heart.mark(self._heart.beat.step, "done")
            self._heart.write()
        else:
            self._heart.write(f"{_who(self._heart.beat)}: {type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()
        faulthandler.enable(file=sys.__stderr__ or sys.stderr)
        if self._stacks is not None:
            self._stacks.close()
        with contextlib.suppress(OSError):
            if self._stacks_path.stat().st_size == 0:
                self._stacks_path.unlink()

    def host_of(self, rank: int) -> str:
        """Where a rank runs, as far as this one knows."""
        seen = self._listener.seen.get(rank)
        return self._heart.beat.host if seen is None else seen.beat.host

    def blame(self) -> str | None:
        """After a collective failed: which rank is dead or silent, if that shows within seconds."""
        others = [r for r in range(self._world_size) if r != self._heart.beat.rank]
        listener = Listener(self._run_dir, others)
        deadline = time.monotonic() + BLAME_SECONDS
        while time.monotonic() < deadline:
            listener.listen()
            for seen in listener.seen.values():
                if seen.beat.verdict is not None:
                    return seen.beat.verdict
                if seen.beat.phase != "done" and known_dead(seen.beat):
                    return (
                        f"{_who(seen.beat)} died; it was last heard of in step {seen.beat.step} "
                        f"({seen.beat.phase})"
                    )
            time.sleep(0.2)
        return None

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self._leaving.wait(self._interval):
            now = time.monotonic()
            if now - before > DEAF_SECONDS:
                self._moved_at += now - before
            before = now
            self._heart.write()
            if not self._timeout:
                continue
            # Fires where the GIL is held for so long that this thread does not come here again.
            faulthandler.dump_traceback_later(self._timeout, file=self._stacks or sys.stderr)
            self._listener.listen()
            verdict = self._verdict()
            if verdict is not None and not self._leaving.wait(self._grace()):
                self._finish(verdict)

    def _grace(self) -> float:
        """Seconds for this rank's own error, if another one has told of its own: most errors are
        raised on all ranks alike, with their own exit codes."""
        told = any(s.beat.verdict is not None for s in self._listener.seen.values())
        return GRACE_SECONDS if told else 0.0

    def _verdict(self) -> str | None:
        now = time.monotonic()
        for seen in self._listener.seen.values():
            if seen.beat.verdict is not None:
                return seen.beat.verdict
            silent = now - seen.heard_at
            if seen.beat.phase != "done" and silent > self._timeout:
                return (
                    f"{_who(seen.beat)} has given no sign of life for {silent:.0f} s; it was "
                    f"last heard of in step {seen.beat.step} ({seen.beat.phase})"
                )
        waited, phase = now - self._moved_at, self._heart.beat.phase
        if phase == "done" or waited < self._allowed(phase) + 2 * self._interval:
            return None  # silence, which says more, would have been noticed before
        if self._heart.beat.rank != 0 and waited < self._allowed(phase) + 2 * self._timeout:
            return None  # rank 0 sees all ranks, and so which one the others wait for
        return f"nothing has moved for {waited:.0f} s: {self._where()}"

    def _allowed(self, phase: Phase) -> float:
        """Seconds that a phase may take."""
        longest = self._longest.get(phase)
        if longest is None or phase in UNEVEN:
            return max(LONG_SECONDS, self._timeout, PATIENCE * (longest or 0.0))
        return max(self._timeout, PATIENCE * longest)

    def _where(self) -> str:
        """Who is furthest behind, and so keeps the others waiting, and where that is."""
        beats = [self._heart.beat, *(s.beat for s in self._listener.seen.values())]
        beats = sorted((b for b in beats if b.phase != "done"), key=lambda b: b.marks)
        last, others = beats[0], beats[1:]
        text = f"{_who(last)} is in step {last.step} ({last.phase})"
        if not others:
            return text
        same = sum(b.marks == last.marks for b in others)
        if same:
            return f"{text}, and so are {same} of {len(others)} others"
        ahead = others[0]
        return f"{text} while the others wait for it in step {ahead.step} ({ahead.phase})"

    def _finish(self, verdict: str) -> NoReturn:
        logger.error("ending the run: %s", verdict)
        if self._stacks is not None:
            self._stacks.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {verdict}\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        for _ in range(TELL_BEATS):
            self._heart.write(verdict)
            time.sleep(self._interval)
            self._listener.listen()
        self._end(verdict, self._end_hanging)

    def _end_hanging(self) -> None:
        """Make silent ranks on this host write their stack traces and end: nobody else may."""
        now = time.monotonic()
        silent = [
            process
            for seen in self._listener.seen.values()
            if now - seen.heard_at > (TELL_BEATS - 1) * self._interval
            and (process := process_of(seen.beat))
        ]
        for process in silent:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGABRT)
                os.kill(process.pid, signal.SIGCONT)
        if silent:
            time.sleep(KILL_AFTER_SECONDS)
        for process in silent:
            with contextlib.suppress(Exception):
                process.kill()


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host} (process {beat.pid})"
