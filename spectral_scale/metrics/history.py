"""Reading `metrics.jsonl` back: the curve a run ended with, and everything it ever wrote."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_scale.metrics.sinks import METRICS_FILE, from_plain

logger = logging.getLogger(__name__)

Line = dict[str, Any]
OPENINGS = ("start", "resume", "rollback")
"""Events that a process's lines begin with, or begin anew."""


@dataclass(frozen=True, kw_only=True)
class MetricsHistory:
    """All whole lines of a run's `metrics.jsonl`, over all its attempts."""

    lines: tuple[Line, ...]
    """Every whole line, in the order of the file."""
    damaged_lines: tuple[int, ...]
    """Numbers, from 1, of lines that are not whole JSON objects with a step (a killed write)."""

    def attempts(self) -> list[list[Line]]:
        """The lines of each process's life, or of the part of one before or after a return to an
        earlier step; a `start`, `resume` or `rollback` line opens a new one."""
        attempts: list[list[Line]] = []
        for line in self.lines:
            if not attempts or line.get("event") in OPENINGS:
                attempts.append([])
            attempts[-1].append(line)
        return attempts

    def current(self) -> list[Line]:
        """One line a step, ascending, of the attempts that the run ended up made of.

        A `start` supersedes everything before it, a `resume` or `rollback` at step k the earlier
        lines of steps beyond k. The lines of one step that remain are merged, later values winning.
        """
        kept = [line for line, fate in self._marked() if fate is None]
        merged: dict[int, Line] = {}
        for line in kept:
            merged[line["step"]] = merged.get(line["step"], {}) | line
        return [merged[step] for step in sorted(merged)]

    def superseded(self) -> list[Line]:
        """Lines of work that was lost to a kill and done again, in the order of the file.

        What a return to an earlier step undid is not among them: other data took its place.
        """
        return [line for line, fate in self._marked() if fate == "lost"]

    def resume_steps(self) -> list[int]:
        """The step of each `resume`, in order."""
        return [line["step"] for line in self.lines if line.get("event") == "resume"]

    def rollback_steps(self) -> list[int]:
        """The step that each `rollback` returned to, in order."""
        return [line["step"] for line in self.lines if line.get("event") == "rollback"]

    def _marked(self) -> list[tuple[Line, str | None]]:
        """Each line with what superseded it: `lost` to a kill, `undone` by a rollback, or None."""
        marked: list[tuple[Line, str | None]] = []
        kept_up_to = done_up_to = float("inf")
        for attempt in reversed(self.attempts()):
            for line in reversed(attempt):
                undone, lost = line["step"] > done_up_to, line["step"] > kept_up_to
                marked.append((line, "undone" if undone else "lost" if lost else None))
            if attempt[0].get("event") == "rollback":
                done_up_to = min(done_up_to, attempt[0]["step"])
            kept_up_to = min(kept_up_to, _keeps_up_to(attempt[0]))
        return marked[::-1]


def load_history(run_dir: Path) -> MetricsHistory:
    """The history of `run_dir`; empty when it has no `metrics.jsonl`.

    A damaged line (the last one of a killed attempt) is left out, counted and logged.

    Raises:
        OSError: the file is there but cannot be read.
    """
    path = run_dir / METRICS_FILE
    lines: list[Line] = []
    damaged: list[int] = []
    content = path.read_bytes() if path.exists() else b""
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        if (line := _decode(raw)) is None:
            damaged.append(number)
        else:
            lines.append(line)
    if damaged:
        logger.warning("%s: line(s) %s are cut off and left out", path, damaged)
    return MetricsHistory(lines=tuple(lines), damaged_lines=tuple(damaged))


def read_metrics(run_dir: Path, *, superseded: bool = False) -> list[Line]:
    """The logged lines of a run: one a step, as the run ended up.

    With `superseded`, every whole line of every attempt in the order it was written. Non-finite
    numbers come back as floats.
    """
    history = load_history(run_dir)
    return list(history.lines) if superseded else history.current()


def _keeps_up_to(opening: Line) -> float:
    """The last step of earlier attempts that an attempt with this first line keeps."""
    if opening.get("event") == "start":
        return -1
    return opening["step"] if opening.get("event") in OPENINGS else float("inf")


def _decode(raw: bytes) -> Line | None:
    try:
        line = json.loads(raw)
    except ValueError:  # also UnicodeDecodeError
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return from_plain(line)
