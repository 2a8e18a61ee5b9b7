"""`spectral-scale verify PATH`: hash every byte of a run's checkpoints against their manifests."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_scale.checkpoint.verify import CheckpointStatus

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = (
    "Read every file of each checkpoint and hold size and sha256 against its manifest. "
    "Exit code 0 if the newest checkpoint is good, 1 otherwise."
)


def add_parser(subparsers: "Subparsers") -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "verify", help="check that checkpoints are undamaged", description=_DESCRIPTION
    )
    parser.add_argument(
        "path", help="a run folder, its checkpoints folder, or one checkpoint (step_XXXXXXXX)"
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how to print the result"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the state of each checkpoint, newest first. Raises CheckpointError if there is none."""
    from spectral_scale.checkpoint.verify import inspect_checkpoints  # torch: slow to import

    found = inspect_checkpoints(args.path)
    if args.format == "json":
        print(json.dumps([_as_json(status) for status in found], indent=2))
    else:
        print(_table(found))
    return 0 if found[0].good else 1


def _as_json(status: "CheckpointStatus") -> dict[str, Any]:
    return {
        "path": str(status.path),
        "step": status.step,
        "bytes": status.bytes,
        "good": status.good,
        "fault": status.fault,
    }


def _table(found: "list[CheckpointStatus]") -> str:
    lines = [f"{'step':>8}  {'bytes':>15}  state"]
    for status in found:
        step = "?" if status.step is None else str(status.step)
        state = "good" if status.good else f"BAD   {status.fault}"
        lines.append(f"{step:>8}  {status.bytes:>15,}  {state}")
    return "\n".join(lines)
