"""`spectral-scale stop RUN`: ask a run to stop or to save, by a file in its folder."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_scale.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """Ask a run to finish its step, save, and end with exit code 75, under every
launcher and from every machine that sees its folder. Start the same command again to continue. A
scheduler is told not to requeue it (`requeue` in status.json); for that: touch RUN/STOP."""


def add_parser(subparsers: "Subparsers") -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "stop", help="stop a run, or have it save", description=_DESCRIPTION
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--save-only", action="store_true", help="save and go on")
    how.add_argument(
        "--now", action="store_true", help="end after the step without saving it; earlier ones stay"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the control file. Raises ConfigError if no run is active or the folder is read-only."""
    from spectral_scale.checkpoint.lock import is_held, read_holder
    from spectral_scale.supervision.control_files import ask

    holder = read_holder(args.run_dir)
    if holder is None or not is_held(args.run_dir):
        raise ConfigError(
            f"no run is active in {args.run_dir} (nobody holds its lock); give the train.run_dir "
            "of one that is, as `spectral-scale status RUN` tells"
        )
    try:
        if args.save_only:
            ask(args.run_dir, "save")
        else:
            ask(args.run_dir, "stop", "now" if args.now else "hold")
    except OSError as error:
        raise ConfigError(f"{args.run_dir} cannot be written: {error}") from None
    what = "save and go on" if args.save_only else "stop"
    print(f"asked {holder} to {what} after its present step", file=sys.stderr)
    return 0
