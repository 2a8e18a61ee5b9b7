"""Making files durable, and free space, on file systems that may not know either."""

import errno
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems answer that cannot flush or lock; any other error is a fault."""


def fsync_descriptor(descriptor: int) -> bool:
    """Flush an open file or folder to disk; False where the file system cannot.

    Raises OSError if it can and fails.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def fsync_directory(folder: Path) -> bool:
    """Make new and renamed names in a folder durable; False where the file system cannot."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return fsync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def fsync_path(file: Path) -> bool:
    """Flush a file that others wrote to disk; False where the file system cannot."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return fsync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int | None:
    """Bytes that may be written to the disk of a folder; None where the file system says nothing.

    Some network and FUSE file systems answer 0 blocks in all: that is no full disk.
    """
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def warn_of_limits(folder: Path) -> None:
    """Warn of what the file system of a folder cannot do, before work depends on it.

    Raises OSError if it can flush names to disk and fails.
    """
    if not fsync_directory(folder):
        logger.warning(
            "%s: this file system cannot flush names to disk (fsync); a power failure may undo "
            "the last file written",
            folder,
        )
    if free_bytes(folder) is None:
        logger.warning(
            "%s: this file system does not tell its free space; a full disk is only noticed when a "
            "write fails",
            folder,
        )
