"""One process a run folder: a lock that the system frees when its holder dies."""

import json
import logging
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import BaseFileLock, FileLock, Timeout

from spectral_scale.errors import ConfigError
from spectral_scale.files.locks import acquire_lock, soft_marker

logger = logging.getLogger(__name__)

LOCK_NAME = "lock.json"
_GLANCE_SECONDS = 0.3
"""Longest time for which a process that only tests the lock may hold it."""
_ORPHAN_SECONDS = 10.0
"""Time allowed for children of a dead holder (data loader workers) to notice and exit."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that runs in a run folder."""

    host: str
    """Name of the host on which the holder runs."""
    pid: int
    """Process id of the holder on that host."""
    started: str
    """Time at which the lock was taken; UTC, ISO 8601."""
    job: str | None = None
    """The scheduler's job it belongs to, if any."""

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, started {self.started}"


class RunLock:
    """Exclusive use of a run folder; only rank 0 takes it.

    RUN/.lock is locked with flock and decides; RUN/lock.json only says who holds it. A holder that
    was killed therefore never blocks the next start, on this host or another. On a file system
    without locks, the marker RUN/.lock.soft decides: what a killed holder left is taken over on its
    own host, and must be removed by hand on others. Keep the object: the lock is gone when it is.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._file_lock: BaseFileLock | None = None

    def acquire(self) -> Self:
        """Take the lock, creating the folder.

        Raises ConfigError, naming host and pid, if another process has it, and if the folder
        cannot be written.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._write_holder()
        except OSError as error:
            if self._file_lock is not None:
                self._file_lock.release()
            raise ConfigError(
                f"run folder {self.run_dir} cannot be used: {error}; "
                "set train.run_dir to a folder that can be written"
            ) from error
        return self

    def release(self) -> None:
        """Give the lock back; without effect if it is not held."""
        if self._file_lock is not None and self._file_lock.is_locked:
            (self.run_dir / LOCK_NAME).unlink(missing_ok=True)
            self._file_lock.release()

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _lock(self) -> None:
        holder = read_holder(self.run_dir)
        gone = holder is not None and _is_gone(holder)
        path = self.run_dir / ".lock"
        if gone:  # no process can hold what this marker stands for
            soft_marker(path).unlink(missing_ok=True)
        try:
            timeout = _ORPHAN_SECONDS if gone else _GLANCE_SECONDS
            self._file_lock = acquire_lock(path, timeout=timeout)
        except Timeout:
            raise ConfigError(_in_use(self.run_dir, holder, gone=gone)) from None
        if holder is not None:
            logger.warning(
                "taking over run folder %s: %s, ended without notice", self.run_dir, holder
            )

    def _write_holder(self) -> None:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        job = os.environ.get("SLURM_JOB_ID")
        holder = Holder(host=socket.gethostname(), pid=os.getpid(), started=started, job=job)
        temporary = self.run_dir / f".{LOCK_NAME}"
        temporary.write_text(json.dumps(asdict(holder)) + "\n", encoding="utf-8")
        temporary.replace(self.run_dir / LOCK_NAME)


def read_holder(run_dir: Path) -> Holder | None:
    """The last holder that did not release the run folder; None if none or unreadable."""
    try:
        values = json.loads((run_dir / LOCK_NAME).read_text(encoding="utf-8"))
        return Holder(
            host=str(values["host"]),
            pid=int(values["pid"]),
            started=str(values["started"]),
            job=None if values.get("job") is None else str(values["job"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_held(run_dir: Path) -> bool:
    """True if a process holds the run folder's lock now; the lock is not affected."""
    path = run_dir / ".lock"
    if soft_marker(path).exists():  # on a file system without locks
        return True
    if not path.exists():
        return False
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _is_gone(holder: Holder) -> bool:
    """True if the holder certainly ended: it ran on this host and its pid is free."""
    if holder.host != socket.gethostname() or holder.pid <= 0:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _in_use(run_dir: Path, holder: Holder | None, *, gone: bool) -> str:
    if holder is None:
        who = "another process"
    elif gone:
        who = f"a child left by process {holder.pid} on this host ({holder.host})"
    else:
        who = str(holder)
    marker = soft_marker(run_dir / ".lock")
    hint = f"; if it has ended, remove {marker}" if marker.exists() else ""
    return (
        f"run folder {run_dir} is in use by {who}; wait for it, stop it, "
        f"or set train.run_dir to another folder{hint}"
    )
