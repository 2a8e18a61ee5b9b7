"""A lock on a folder: of the system where the file system has locks, else a marker file."""

import errno
import fcntl
import logging
import os
import threading
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
SOFT_SUFFIX = ".soft"
"""Appended to a lock file's name for the marker."""


def acquire_lock(path: Path, *, timeout: float) -> BaseFileLock:
    """Take a lock; the object releases it.

    A lock of the system is freed when its holder dies. Where the file system has none, a marker
    file stands for it, with a warning: a holder that was killed leaves it behind, and it is taken
    over only on the host where that process is known to have ended.

    Raises:
        filelock.Timeout: another process holds it.
        OSError: the lock file cannot be made.
    """
    reason = why_no_locks(path.parent)
    if reason is None:
        lock: BaseFileLock = FileLock(path, thread_local=False)
    else:
        marker = soft_marker(path)
        logger.warning(
            "%s: this file system has no locks (%s); the marker %s is used instead: if a holder is "
            "killed on another host, remove it by hand",
            path.parent,
            reason,
            marker.name,
        )
        lock = SoftFileLock(marker, thread_local=False)
    lock.acquire(timeout=timeout)
    return lock


def why_no_locks(folder: Path) -> str | None:
    """Why files in a folder cannot be locked; None if they can. Tried on a file of its own."""
    probe = folder / f".lock_probe_{os.getpid()}_{threading.get_ident()}"
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return error.strerror or str(error)
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)
    return None


def soft_marker(path: Path) -> Path:
    """The marker file that stands for a lock where there are none."""
    return path.with_name(path.name + SOFT_SUFFIX)
