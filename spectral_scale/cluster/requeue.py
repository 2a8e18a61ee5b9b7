"""Decides the exit code of a job script and whether SLURM requeues the job."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectral_scale.cluster.slurm import SCONTROL_SECONDS

RESUMABLE, NO_PROGRESS = 75, 93
OWN_CODES = frozenset((0, RESUMABLE, 78, NO_PROGRESS))
"""Exit codes that only the run itself uses; some launchers replace them by their own."""


@dataclass(frozen=True, kw_only=True)
class RequeueDecision:
    """The verdict on one attempt."""

    code: int
    """The job's exit code."""
    requeue: bool
    """Whether SLURM should start the job again."""
    reason: str
    """Reason of the decision, for the log."""


def requeue_decision(
    code: int, status: Mapping[str, Any], *, job: str, since: float
) -> RequeueDecision:
    """Decide from the launcher's exit code `code` and status.json.

    Args:
        code: exit code of the launcher.
        status: the run's status.json; empty if there is none.
        job: this job's id.
        since: when this attempt began, seconds since 1970. An older status, or another job's, says
            nothing about this attempt.
    """
    mine = status.get("job") == job and _number(status, "time") >= since
    if not mine:
        return RequeueDecision(
            code=code, requeue=False, reason="the run wrote no status in this attempt"
        )
    said = status.get("exit_code")
    if code not in OWN_CODES and code != 0 and type(said) is int and said != 0:
        code = said
    state, reason = status.get("state"), str(status.get("reason") or "no reason given")
    if code != RESUMABLE:
        return RequeueDecision(code=code, requeue=False, reason=f"{state}: {reason}")
    if not status.get("requeue", False):
        return RequeueDecision(code=code, requeue=False, reason=f"{reason}; not to be requeued")
    step, start = _number(status, "step"), _number(status, "start_step")
    if step <= start:
        return RequeueDecision(
            code=NO_PROGRESS,
            requeue=False,
            reason=f"{reason} at step {step:.0f}, where it began: give the job more time",
        )
    return RequeueDecision(code=code, requeue=True, reason=f"{reason} at step {step:.0f}")


def _number(status: Mapping[str, Any], key: str) -> float:
    value = status.get(key, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def requeue(job: str) -> str | None:
    """Have SLURM start the job again; what prevented it, or None.

    A job that is being ended (cancelled, or preempted and requeued by SLURM itself) is left alone.
    """
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        return "scontrol is not installed"
    shown = _call([scontrol, "--oneliner", "show", "job", job])
    state = re.search(r"\bJobState=(\w+)", shown.stdout)
    if state is None or state[1] != "RUNNING":
        return f"the job is {state[1] if state else 'unknown'}; SLURM decides what follows"
    done = _call([scontrol, "requeue", job])
    return None if done.returncode == 0 else done.stderr.strip() or "scontrol requeue failed"


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False
    )
