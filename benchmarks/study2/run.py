"""The second study: what closes the gap to dense training, at equal tokens, time and bytes.

    python benchmarks/study2/run.py --work FOLDER [--data DATA] [--workers 2] [--only tune ...]
    python benchmarks/study2/run.py --list
    python benchmarks/study2/run.py --render

Every run is a real `spectral-scale train` of a minute to a quarter of an hour on one thread. The
first form runs what is left: finished runs are skipped, killed ones continue from FOLDER, Ctrl-C or
SIGTERM saves and ends. A finished run's result is one small file in docs/study2/results. The last
form writes the tables and plots of docs/study2.md from these files alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from study.command import Study, run_command

from study2.listing import listing
from study2.plan import STAGES, all_trials
from study2.prepare import prepare_characters
from study2.render import render


def main() -> int:
    """0 done, 75 stopped and resumable, 1 failed."""
    study = Study(
        description=__doc__,
        folder="study2",
        stages=STAGES,
        plan=all_trials,
        listing=listing,
        render=render,
        prepare=prepare_characters,
    )
    return run_command(study)


if __name__ == "__main__":
    sys.exit(main())
