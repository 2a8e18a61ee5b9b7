"""The study of what SST gives: one command that runs it, continues it, and writes its page.

    python benchmarks/study/run.py --work FOLDER [--workers 2] [--only tune ...]
    python benchmarks/study/run.py --list
    python benchmarks/study/run.py --render

Every run is a real `spectral-scale train`. The first form runs what is left: finished runs are
skipped, killed ones continue from FOLDER, Ctrl-C or SIGTERM saves and ends. A finished run's result
is one small file in docs/study/results, so that a clone continues where the last one was committed.
The last form writes the tables and plots of docs/study.md from these files alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from spectral_scale.errors import SpectralScaleError
from study.execute import Executor, train_command
from study.listing import listing
from study.plan import STAGES, Trial
from study.prepare import prepare_books
from study.render import render
from study.results import StudyError, read_results

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "study" / "results"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, help="folder of data and runs; several GB")
    what.add_argument("--list", action="store_true", help="say what is done and what is left")
    what.add_argument("--render", action="store_true", help="write docs/study.md from the results")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help=f"run only stages ({', '.join(STAGES)}) or runs whose name begins like this",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} must be at least 1")
    return arguments


def main() -> int:
    """0 done, 75 stopped and resumable, 1 failed."""
    arguments = parse_arguments()
    try:
        if arguments.list:
            print(listing(read_results(arguments.results), workers=arguments.workers))
            return 0
        if arguments.render:
            print("\n".join(render(read_results(arguments.results), DOCS)))
            return 0
        return run(arguments)
    except (StudyError, SpectralScaleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Run what is left of what was asked for."""

    def wanted(trial: Trial) -> bool:
        return not arguments.only or trial.name.startswith(tuple(arguments.only))

    work = arguments.work.resolve()
    return Executor(
        results=arguments.results,
        runs=work / "runs",
        command=train_command(prepare_books(work / "data")),
        wanted=wanted,
        workers=arguments.workers,
        say=lambda text: print(text, flush=True),
    ).run()


if __name__ == "__main__":
    sys.exit(main())
