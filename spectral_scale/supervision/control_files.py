"""STOP and SAVE: files in the run folder by which anybody who may write there stops a run.

They work under every launcher and scheduler, which treat signals each in their own way.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spectral_scale.supervision.status import write_json

logger = logging.getLogger(__name__)

STOP_NAME, SAVE_NAME = "STOP", "SAVE"
Manner = Literal["requeue", "hold", "now"]
"""How to stop: saved and to be requeued, saved and not to be requeued, or without saving."""
_MAX_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the control files ask for."""

    stop: Manner | None = None
    """How to stop; None to go on."""
    save: bool = False
    """Whether to save a checkpoint and go on."""


class ControlFiles:
    """Reads the files between steps, on rank 0 only.

    A file system may show other ranks other things; the consensus tells them what rank 0 read.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._stop, self._save = run_dir / STOP_NAME, run_dir / SAVE_NAME

    def clear(self) -> None:
        """Remove what lies there before the start: it was meant for a process that has ended."""
        for path in (self._stop, self._save):
            if _remove(path):
                logger.warning("%s was there before the start and is removed", path)

    def read(self) -> Request:
        """Read what is asked for now; without files that takes two system calls."""
        return Request(stop=_manner(self._stop), save=os.path.lexists(self._save))

    def remove_save(self) -> None:
        """Remove SAVE once it is honoured."""
        _remove(self._save)

    def remove_all(self) -> None:
        """Remove STOP and SAVE once honoured; the next start resumes."""
        _remove(self._stop)
        _remove(self._save)


def ask(run_dir: Path, what: Literal["stop", "save"], manner: Manner = "hold") -> Path:
    """Write the control file, in place of an earlier one. Raises OSError."""
    path = run_dir / (STOP_NAME if what == "stop" else SAVE_NAME)
    write_json(path, manner)
    return path


def _manner(path: Path) -> Manner | None:
    """How a STOP file asks to stop; an empty one, as `touch` makes it, allows a requeue."""
    if not os.path.lexists(path):
        return None
    try:
        with open(path, "rb") as file:
            word = file.read(_MAX_BYTES).decode("ascii", "replace").strip().strip('"')
    except OSError:
        word = ""
    return "now" if word == "now" else "hold" if word == "hold" else "requeue"


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
        return False
    return True
