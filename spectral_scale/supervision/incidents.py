"""incidents.jsonl: what went wrong in a run and what was done about it, one object a line."""

import json
import logging
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

INCIDENTS_NAME = "incidents.jsonl"


def record(run_dir: Path, kind: str, step: int, **facts: Any) -> None:
    """Append one incident. Never raises: the run has trouble enough. Rank 0 only."""
    line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | facts
    try:
        with open(run_dir / INCIDENTS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logger.warning("%s could not be written: %s", INCIDENTS_NAME, error)


def read_incidents(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines; none if there is no file."""
    found = []
    try:
        text = (run_dir / INCIDENTS_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
