"""The study of fine-tuning: one command that runs it, continues it, and writes its page.

    python benchmarks/finetune_study/run.py --data BOOKS --work FOLDER
    python benchmarks/finetune_study/run.py --list
    python benchmarks/finetune_study/run.py --render

A tiny model is pretrained on books and fine-tuned on a few pages of an author it has not seen, with
every method, with and without the filter and its controls. Every run is a real `spectral-scale
finetune`. The first form runs what is left: finished runs are skipped, Ctrl-C or SIGTERM saves and
ends. BOOKS holds train-*.jsonl and valid.jsonl of objects with `author` and `text`. A finished
run's result is one small file in docs/finetune_study/results; the last form writes the tables and
plots of docs/finetune_study.md from these files alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from study.results import StudyError, read_results

from finetune_study.execute import run_all
from finetune_study.plan import all_trials
from finetune_study.prepare import prepare_data, pretrain
from finetune_study.render import render
from spectral_scale.errors import SpectralScaleError

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "finetune_study" / "results"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, help="folder of tokens, model and runs")
    what.add_argument("--list", action="store_true", help="say what is done and what is next")
    what.add_argument("--render", action="store_true", help="write docs/finetune_study.md")
    parser.add_argument("--data", type=Path, help="folder of the books, for --work")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.work is not None and arguments.data is None:
        parser.error("--work needs --data BOOKS")
    return arguments


def run_study(arguments: argparse.Namespace) -> int:
    """0 nothing is left, 75 stopped and resumable, 1 a run failed."""
    work = arguments.work.resolve()
    data = prepare_data(arguments.data, work / "data")
    own = {
        "model.path": pretrain(data, work),
        "data.train": data / "author_train",
        "data.validation": data / "author_valid",
    }
    return run_all(arguments.results, work / "runs", own, lambda text: print(text, flush=True))


def main() -> int:
    """0 done, 75 stopped and resumable, 1 failed."""
    arguments = parse_arguments()
    try:
        results = read_results(arguments.results)
        if arguments.list:
            for trial in all_trials(results):
                print(f"{'done' if trial.name in results else 'open'}  {trial.name}")
            return 0
        if arguments.render:
            print("\n".join(render(results, DOCS)))
            return 0
        return run_study(arguments)
    except (StudyError, SpectralScaleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
