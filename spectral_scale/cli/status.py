"""`spectral-scale status RUN`: where a run stands, from its folder alone."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_scale.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """Say where a run stands: its state, its checkpoints, where each rank was last heard
of, and what went wrong. Reads files only."""
SILENT_SECONDS = 60.0
"""A rank whose heartbeat file is older than this is shown as silent."""


def add_parser(subparsers: "Subparsers") -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "status", help="say where a run stands", description=_DESCRIPTION
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run folder")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the status. Raises ConfigError for a folder that holds no run."""
    found = collect(args.run_dir)
    print(json.dumps(found, indent=2) if args.format == "json" else _text(found))
    return 0


def collect(run_dir: Path) -> dict[str, Any]:
    """Collect everything that the command tells, as JSON values."""
    from spectral_scale.checkpoint.lock import is_held, read_holder
    from spectral_scale.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints, step_of
    from spectral_scale.supervision.heartbeat import heartbeat_path, read_beats
    from spectral_scale.supervision.incidents import read_incidents
    from spectral_scale.supervision.status import read_status

    status = read_status(run_dir)
    holder = read_holder(run_dir)
    if not status and holder is None:
        raise ConfigError(f"{run_dir} holds no status.json: not a run; give its train.run_dir")
    ranks = []
    for beat in read_beats(run_dir):
        age = time.time() - heartbeat_path(run_dir, beat.rank).stat().st_mtime
        place = {"rank": beat.rank, "host": beat.host, "pid": beat.pid}
        ranks.append(place | {"step": beat.step, "phase": beat.phase, "seconds_ago": round(age, 1)})
    active = is_held(run_dir)
    if not active and status.get("state") == "running":
        status |= {"state": "failed", "reason": "its process is gone and left no word"}
    saved = sorted(step_of(p.name) or 0 for p in list_checkpoints(run_dir / CHECKPOINTS_NAME))
    return status | {
        "active": active,
        "holder": str(holder) if active and holder is not None else None,
        "checkpoints": saved,
        "ranks": ranks,
        "incidents": read_incidents(run_dir),
    }


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found.get('state', 'unknown')}: step {found.get('step')} of {found.get('steps')}"]
    if found.get("reason"):
        lines.append(f"reason: {found['reason']}")
    if found["holder"]:
        lines.append(f"held by {found['holder']}")
    lines.append(f"checkpoints: {', '.join(map(str, found['checkpoints'])) or 'none'}")
    for rank in found["ranks"]:
        silent = found["active"] and rank["seconds_ago"] > SILENT_SECONDS
        lines.append(
            f"rank {rank['rank']} on {rank['host']} (process {rank['pid']}): step {rank['step']}, "
            f"{rank['phase']}, {rank['seconds_ago']:.0f} s ago{'  SILENT' if silent else ''}"
        )
    for incident in found["incidents"][-5:]:
        lines.append(f"{incident.get('kind')} at step {incident.get('step')}")
    return "\n".join(lines)
