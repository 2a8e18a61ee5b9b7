"""The command of a study: run what is left, list it, or write its page."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectral_scale.errors import SpectralScaleError
from study.execute import Executor, train_command
from study.results import Result, StudyError, read_results
from study.trial import Plan, Trial

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its command sees it."""

    description: str | None
    """Text of --help."""
    folder: str
    """Folder of results and figures inside docs/."""
    stages: Sequence[str]
    """Its parts."""
    plan: Plan
    """Its runs."""
    listing: Callable[[Mapping[str, Result], int], str]
    """Says what is done and left, from the results and the number of workers."""
    render: Callable[[Mapping[str, Result], Path], list[str]]
    """Writes the page and its figures into docs/; their paths."""
    prepare: Callable[[Path, Path | None], Path]
    """Makes the token folders in a folder, from the data folder that was named; where they are."""


def run_command(study: Study) -> int:
    """0 done, 75 stopped and resumable, 1 failed."""
    arguments = _parse(study)
    try:
        if arguments.list:
            print(study.listing(read_results(arguments.results), arguments.workers))
            return 0
        if arguments.render:
            print("\n".join(study.render(read_results(arguments.results), DOCS)))
            return 0
        return _run(study, arguments)
    except (StudyError, SpectralScaleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(study: Study) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=study.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    page = f"docs/{study.folder}.md"
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, help="folder of data and runs; several GB")
    what.add_argument("--list", action="store_true", help="say what is done and what is left")
    what.add_argument("--render", action="store_true", help=f"write {page} from the results")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder that has `books` in it; by default the one that SPECTRAL_SCALE_DATA names",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help=f"run only stages ({', '.join(study.stages)}) or runs whose name begins like this",
    )
    results = DOCS / study.folder / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} must be at least 1")
    return arguments


def _run(study: Study, arguments: argparse.Namespace) -> int:
    """Run what is left of what was asked for."""

    def wanted(trial: Trial) -> bool:
        only = arguments.only
        return not only or trial.stage in only or trial.name.startswith(tuple(only))

    work = arguments.work.resolve()
    return Executor(
        results=arguments.results,
        runs=work / "runs",
        command=train_command(study.prepare(work / "data", arguments.data)),
        plan=study.plan,
        wanted=wanted,
        workers=arguments.workers,
        say=lambda text: print(text, flush=True),
    ).run()
