"""status.json: where a run stands, for schedulers, people, and the run's own next start."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from spectral_scale.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints, step_of

logger = logging.getLogger(__name__)

State = Literal["running", "completed", "stopped", "failed", "no_progress"]
STATUS_NAME = "status.json"
EXIT_CODES: dict[State, int] = {"completed": 0, "stopped": 75, "failed": 1, "no_progress": 93}
"""Exit codes by state; an error may carry another one."""
KEPT = ("start_step", "starts_without_progress", "save_seconds", "incidents")
"""Keys that are carried over from one write to the next unless they are given anew."""


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one piece, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Read the last status written; empty if there is none that can be read."""
    try:
        found = json.loads((run_dir / STATUS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_status(
    run_dir: Path, state: State, *, step: int, steps: int, reason: str = "", **facts: Any
) -> None:
    """Write status.json, which tells schedulers and people where the run stands.

    Never raises for a full disk: a run must not end, nor its error be hidden, for want of it.

    Args:
        run_dir: the run folder.
        state: how the run stands.
        step: the last step known to be saved, or taken if the run ended in order.
        steps: the steps of the whole run.
        reason: why it is not running.
        facts: further keys; those of `KEPT` stay until they are given again.
    """
    kept = {key: value for key, value in read_status(run_dir).items() if key in KEPT}
    status = kept | {
        "state": state,
        "step": step,
        "steps": steps,
        "reason": reason,
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job_id(),
    }
    if state != "running":
        status |= {"exit_code": EXIT_CODES[state], "requeue": state == "stopped"}
    try:
        write_json(run_dir / STATUS_NAME, status | facts)
    except OSError as error:
        logger.warning("%s could not be written: %s", STATUS_NAME, error)


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, by its folder's name; 0 if there is none."""
    try:
        folders = list_checkpoints(run_dir / CHECKPOINTS_NAME)
    except OSError:
        return 0
    return max((step_of(folder.name) or 0 for folder in folders), default=0)


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The scheduler's name for this job, if there is one."""
    return environment.get("SLURM_JOB_ID") or environment.get("PBS_JOBID")
