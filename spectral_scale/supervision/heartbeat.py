"""Signs of life: each rank says in a file, every second or two, where it stands.

A file counts as new when its content changes, by the reader's own clock: hosts' clocks may differ
and jump. Rank 0 reads all files, the others read rank 0's.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

FOLDER = "heartbeats"
DEAF_SECONDS = 10.0
"""A listener that is this late was held up itself (a stalled file system, a stopped process)."""
Phase = Literal[
    "start", "data", "forward", "backward", "agree", "step", "evaluation", "save", "done"
]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What one rank writes about itself."""

    rank: int
    """The rank that writes."""
    host: str
    """The name of the machine that it runs on."""
    pid: int
    """Process id of the rank on that machine."""
    born: float
    """Process start time; it distinguishes a reused process id."""
    step: int = 0
    """The number of steps taken before the one it works on."""
    phase: Phase = "start"
    """The phase of the step."""
    marks: int = 0
    """How often it has entered a phase."""
    beats: int = 0
    """How often it has written this file."""
    verdict: str | None = None
    """Why it is about to end the run; None while it goes on."""


class Heartbeat:
    """Writes one rank's own file.

    Args:
        run_dir: the run folder, which all ranks see.
        rank: this process.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.path = heartbeat_path(run_dir, rank)
        me = psutil.Process()
        host = socket.gethostname()
        self.beat = Beat(rank=rank, host=host, pid=me.pid, born=me.create_time())

    def mark(self, step: int, phase: Phase) -> None:
        """Note that this rank enters another phase; nothing is written yet."""
        self.beat = replace(self.beat, step=step, phase=phase, marks=self.beat.marks + 1)

    def write(self, verdict: str | None = None) -> None:
        """Write the file. An error is suppressed: a full disk does not mean that a rank died."""
        self.beat = replace(self.beat, beats=self.beat.beats + 1, verdict=verdict)
        temporary = self.path.with_name(f".{self.path.name}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(asdict(self.beat)) + "\n", encoding="utf-8")
            temporary.replace(self.path)


@dataclass
class Observed:
    """Another rank as this one has observed it."""

    beat: Beat
    """The last heartbeat that was read."""
    heard_at: float
    """Time at which a new heartbeat was last read, by this rank's clock."""


class Listener:
    """Follows the heartbeat files of other ranks.

    Args:
        run_dir: the run folder.
        ranks: the ranks to follow.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self, run_dir: Path, ranks: range | list[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir, self._ranks, self._clock = run_dir, list(ranks), clock
        self._listened_at = clock()
        self.seen: dict[int, Observed] = {}

    def listen(self) -> None:
        """Read each rank's file once."""
        now = self._clock()
        if (deaf := now - self._listened_at) > DEAF_SECONDS:
            for observed in self.seen.values():  # this rank was held up, and heard nothing
                observed.heard_at += deaf
        self._listened_at = now
        for rank in self._ranks:
            beat = read_beat(self._run_dir, rank)
            known = self.seen.get(rank)
            if beat is None or known is None or beat.pid != known.beat.pid:
                if beat is not None:
                    self.seen[rank] = Observed(beat=beat, heard_at=now)
                continue
            if beat.beats != known.beat.beats:
                known.heard_at = now
            known.beat = beat


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    """The path of a rank's file, RUN/heartbeats/rank_00000.json."""
    return run_dir / FOLDER / f"rank_{rank:05d}.json"


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """A rank's last heartbeat; None if there is none that can be read."""
    try:
        raw = json.loads(heartbeat_path(run_dir, rank).read_text(encoding="utf-8"))
        return Beat(**raw)
    except (OSError, ValueError, TypeError):
        return None


def read_beats(run_dir: Path) -> list[Beat]:
    """The last heartbeats of all ranks, in order."""
    count = len(list((run_dir / FOLDER).glob("rank_*.json")))
    found = (read_beat(run_dir, rank) for rank in range(count))
    return [beat for beat in found if beat is not None]


def forget(run_dir: Path) -> None:
    """Remove the files of an earlier start, before any rank of this one writes."""
    for path in (run_dir / FOLDER).glob("rank_*.json"):
        with contextlib.suppress(OSError):
            path.unlink()


def process_of(beat: Beat) -> Any | None:
    """The rank's process if it is alive on this host, as a psutil.Process."""
    if beat.host != socket.gethostname() or beat.pid == os.getpid():
        return None
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(beat.pid)
        if abs(process.create_time() - beat.born) < 1.0:
            return process
    return None


def known_dead(beat: Beat) -> bool:
    """Whether the rank ran on this host and its process has ended."""
    if beat.host != socket.gethostname() or beat.pid == os.getpid():
        return False
    process = process_of(beat)
    with contextlib.suppress(psutil.Error):
        return process is None or process.status() == psutil.STATUS_ZOMBIE
    return True
