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
    """What the files ask for."""

    stop: Manner | None = None
    """How to stop, if at all."""
    save: bool = False
    """Whether to save and go on."""


class ControlFiles:
    """Reads the files between steps. Rank 0 only: file systems may show other ranks other things.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._stop, self._save = run_dir / STOP_NAME, run_dir / SAVE_NAME

    def clear(self) -> None:
        """At the start: what lies there was meant for an earlier process, which is gone."""
        for path in (self._stop, self._save):
            if _remove(path):
                logger.warning("%s was there before the start and is removed", path)

    def read(self) -> Request:
        """What is asked for now; two system calls."""
        return Request(stop=_manner(self._stop), save=os.path.lexists(self._save))

    def saved(self) -> None:
        """The request to save has been met."""
        _remove(self._save)

    def stopped(self) -> None:
        """So has the one to stop; the next start goes on."""
        _remove(self._stop)
        _remove(self._save)


def ask(run_dir: Path, what: Literal["stop", "save"], manner: Manner = "hold") -> Path:
    """Put the file there; any earlier one is replaced. Raises OSError."""
    path = run_dir / (STOP_NAME if what == "stop" else SAVE_NAME)
    write_json(path, manner)
    return path


def _manner(path: Path) -> Manner | None:
    """An empty file, as `touch` makes it, asks to stop and may be requeued."""
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
