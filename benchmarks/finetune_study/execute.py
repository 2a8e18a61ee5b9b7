"""Runs trials with the real `spectral-scale finetune`, one after another, and writes results."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from study.collect import collect, diverged
from study.results import Result, StudyError, read_results, require_same_data, write_result

from finetune_study.plan import Trial, all_trials
from finetune_study.settings import Settings
from spectral_scale.cli.main import main
from spectral_scale.models.weights import FolderWeights

RESUMABLE = 75


def command(words: list[str], values: Mapping[str, object]) -> int:
    """Run a command of the product in this process; its exit code."""
    return main([*words, *(f"--{key}={_word(value)}" for key, value in values.items())])


def run_all(results: Path, runs: Path, own: Settings, say: Callable[[str], None]) -> int:
    """Run what is left. 0: nothing is left; 75: stopped, the same call continues; 1: a run failed.

    Args:
        results: folder of the results.
        runs: folder of run folders; a stopped run continues from its own, a finished one's goes.
        own: paths of data and model.
        say: where progress goes.
    """
    failed: set[str] = set()
    base = FolderWeights(Path(own["model.path"])).fingerprint()
    while True:
        known = read_results(results)
        require_same_data(known)
        require_same_base(known, base)
        left = (t for t in all_trials(known) if t.name not in known and t.name not in failed)
        trial = next(left, None)
        if trial is None:
            return 1 if failed else 0
        code = _run(trial, base, results, runs, own, say)
        if code == RESUMABLE:
            return code
        if code:
            failed.add(trial.name)


def require_same_base(results: Mapping[str, Result], base: str) -> None:
    """Raises StudyError if a result started from another pretrained model than this one."""
    others = [name for name, r in results.items() if r.facts.get("base_fingerprint") != base]
    if others:
        raise StudyError(
            f"runs {others[:3]} (of {len(others)}) started from another pretrained model than "
            f"{base[:16]}..., so their losses cannot be compared; remove their results"
        )


def _run(
    trial: Trial,
    base: str,
    results: Path,
    runs: Path,
    own: Settings,
    say: Callable[[str], None],
) -> int:
    run_dir, started = runs / trial.name, time.process_time()
    code = command(["finetune"], trial.settings | own | {"train.run_dir": run_dir})
    lost = diverged(run_dir)
    if code and not lost:
        say(f"{trial.name}: exit code {code}")
        return code
    result = collect(trial, run_dir, diverged=lost)  # type: ignore[arg-type]
    result.facts["base_fingerprint"] = base
    result.facts["processor_seconds"] = round(time.process_time() - started, 1)
    write_result(results, result)
    shutil.rmtree(run_dir)
    say(f"{trial.name}: {result.loss:.4f} after {result.facts['processor_seconds']} s")
    return 0


def _word(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
