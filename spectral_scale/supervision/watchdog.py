"""Ends a run whose rank died or hangs: names it, leaves stack traces, and frees the GPUs.

A thread beside the loop does it. It works while the main thread waits in a collective for ever,
which is what all other ranks do when one is gone.

Who ends whom, and when, with health.hang_timeout_seconds at 45, a heartbeat every 2 s, and the
machine of rank 2 of 4 lost at t = 0 s:

    t        what happens
    0        The main threads of ranks 0, 1 and 3 wait for rank 2 in a collective. Their watchdogs
             write heartbeats on. Rank 0's watchdog reads all files, the others read rank 0's.
    45       Rank 2's file has not changed for 45 s on rank 0's clock: "rank 2 on host7 (process
             311) has given no sign of life". Rank 0 writes its stack traces and puts that verdict
             into its heartbeat, where it stays for 3 heartbeats.
    47       Ranks 1 and 3 read it. They wait 3 s in case an error of their own is on its way, and
             then do as rank 0 does, 5 s after it.
    51       Rank 0 notes the verdict in status.json. Then it sends SIGABRT and SIGCONT to silent
             ranks of its own machine, so that they write their stack traces, and SIGKILL 2 s
             later: a rank that is stopped would otherwise keep its GPU. Here there is none. No
             rank kills one on another machine; the launcher there does.
    51..53   Rank 0 ends its process with the exit code of a lost rank.
    56       Ranks 1 and 3 end theirs, unless their launcher has done so.

If a rank lives but does not move (its main thread hangs while its watchdog writes), its file still
changes, and the time that ranks spend in a phase decides. Rank 0 allows 45 s or 10 times the
longest such phase so far, whichever is more, and for uneven phases at least 600 s and the time of
an owner's decompositions (`backends.limits`); it names the rank that is furthest behind. Other
ranks wait 90 s longer, since only rank 0 sees all. If communication fails at once instead
("connection closed by peer"), the error arrives in `Watchdog.__exit__`, which looks up to 10 s for
the rank that died and names it.
"""

import contextlib
import faulthandler
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn, Self

from spectral_scale.errors import LostRankError
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
"""Ends this process, given the verdict and a function that ends hanging ranks. The verdict is noted
before that is called: a launcher that sees one rank end may kill all others at once."""

UNEVEN: tuple[Phase, ...] = ("start", "step", "evaluation", "save")
"""Phases that are long now and then: decompositions and swaps, evaluation, saving."""
LONG_SECONDS = 600.0
"""Seconds allowed for uneven phases, and for any phase the first time (compilation); more where
decompositions take longer."""
PATIENCE = 10.0
"""A phase may take this many times the longest so far, and at least the timeout."""
MAX_BEAT_SECONDS = 2.0
"""Seconds between heartbeats, less where the timeout is short."""
TELL_BEATS = 3
"""Heartbeats that a verdict stays up before its writer leaves, so that all others read it."""
KILL_AFTER_SECONDS = 2.0
"""Time for a hanging rank on this host to write its stack traces before it is killed."""
GRACE_SECONDS = 3.0
"""Time for this rank's own error once another rank has told of its own."""
BLAME_SECONDS = 10.0
"""How long to look for the rank that caused a collective to fail."""
_COMMUNICATION = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out", re.IGNORECASE)


def exit_at_once(verdict: str, end_hanging: Callable[[], None]) -> NoReturn:
    """End this process without waiting for the main thread, which may wait for ever."""
    end_hanging()
    os._exit(1)


class Watchdog:
    """Use it as a context manager around the loop; call `mark` wherever a rank moves on.

    Args:
        run_dir: the run folder, which all ranks see.
        rank: this process.
        world_size: the number of ranks.
        timeout_seconds: silence that counts as death; 0 writes heartbeats and watches nothing.
        end: called in the watchdog's thread to end the process.
        long_seconds: allowed for uneven phases, which hold decompositions.
        most_seconds: allowed at most, whatever phases took before: torch's collectives give up
            later than that, and name no rank.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        end: End,
        long_seconds: float = LONG_SECONDS,
        most_seconds: float = math.inf,
    ) -> None:
        self._run_dir, self._world_size = run_dir, world_size
        self._long, self._most = long_seconds, most_seconds
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
        """Note that this rank enters a phase of a step, and that the phase before has ended."""
        now, before = time.monotonic(), self._heart.beat.phase
        self._longest[before] = max(self._longest.get(before, 0.0), now - self._moved_at)
        self._heart.mark(step, phase)
        self._moved_at = now

    def __enter__(self) -> Self:
        self._stacks = open(self._stacks_path, "a", encoding="utf-8")
        # SIGABRT, too, then writes stack traces there, even where the GIL is held.
        faulthandler.enable(file=self._stacks)
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
        """Raises LostRankError from an error of communication if a rank is found dead."""
        # The thread goes on meanwhile: others must see that this rank lives and is not to blame.
        lost = None if error is None else self._lost_rank(error)
        self._stop(lost or error)
        if lost is not None:
            raise lost from error

    def _stop(self, error: BaseException | None) -> None:
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
        """The machine of a rank; this rank's own where the other has not been heard of."""
        seen = self._listener.seen.get(rank)
        return self._heart.beat.host if seen is None else seen.beat.host

    def _lost_rank(self, error: BaseException) -> LostRankError | None:
        """The error that names the rank which made a collective fail, if one is found dead."""
        if not isinstance(error, RuntimeError) or not _COMMUNICATION.search(str(error)):
            return None
        logger.error("a collective failed", exc_info=error)  # it may say more than the name does
        culprit = self._culprit()
        if culprit is None:
            return None
        return LostRankError(
            f"{culprit}; this rank cannot go on alone. Start again to resume from the last "
            "checkpoint"
        )

    def _culprit(self) -> str | None:
        """Which rank has died, in words, if that shows within seconds."""
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
        """Seconds to wait for an error of this rank's own before its process is ended.

        Most errors are raised on all ranks alike, with their own exit codes: where another rank
        has told of one, this rank's is on its way.
        """
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
            allowed = max(self._long, self._timeout, PATIENCE * (longest or 0.0))
        else:
            allowed = max(self._timeout, PATIENCE * longest)
        return min(allowed, self._most)

    def _where(self) -> str:
        """Names the rank that is furthest behind, for which the others wait, and where it is."""
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
        """Make silent ranks on this host write their stack traces, then kill them."""
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
