"""The study of what SST gives: one command that runs it, continues it, and writes its page.

    python benchmarks/study/run.py --work FOLDER [--workers 2] [--only tune ...]
    python benchmarks/study/run.py --list
    python benchmarks/study/run.py --render

Every run is a real `spectral-scale train`. The first form runs what is left: finished runs are
skipped, killed ones continue from FOLDER, Ctrl-C or SIGTERM saves and ends. A finished run's result
is one small file in docs/study/results, so that a clone continues where the last one was committed.
The last form writes the tables and plots of docs/study.md from these files alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from study.command import Study, run_command
from study.listing import listing
from study.plan import STAGES, all_trials
from study.prepare import prepare_books
from study.render import render


def main() -> int:
    """0 done, 75 stopped and resumable, 1 failed."""
    study = Study(
        description=__doc__,
        folder="study",
        stages=STAGES,
        plan=all_trials,
        listing=lambda results, workers: listing(results, workers=workers),
        render=render,
        prepare=prepare_books,
    )
    return run_command(study)


if __name__ == "__main__":
    sys.exit(main())
