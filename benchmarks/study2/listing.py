"""What is done and left of the second study, and about how many processor hours that takes."""

from collections import defaultdict
from collections.abc import Mapping

from study.listing import list_trials
from study.results import Result
from study.trial import Trial

from study2 import settings as declared
from study2.plan import all_trials, width_of

OVERHEAD = 1.15
"""Evaluations, checkpoints and starts, on top of the steps."""


def listing(results: Mapping[str, Result], workers: int) -> str:
    """A line a run, then what is left in runs, steps and hours."""
    trials = all_trials(results)
    speed = _seconds_per_step(trials, results)

    def seconds(trial: Trial) -> float:
        width = width_of(trial)
        guess = speed.get(str(width), declared.SECONDS_PER_STEP[width])
        return trial.steps * speed.get(_kind(trial), guess) * OVERHEAD

    return list_trials(trials, results, workers, seconds)


def _seconds_per_step(trials: list[Trial], results: Mapping[str, Result]) -> dict[str, float]:
    """Measured processor seconds a step by variant and, as a mean, by width."""
    measured = defaultdict(list)
    for trial in trials:
        result = results.get(trial.name)
        if result is not None and result.costs and result.costs[-1][0]:
            step, _, seconds, _ = result.costs[-1]
            for key in (_kind(trial), str(width_of(trial))):
                measured[key].append(seconds / step)
    return {key: sum(values) / len(values) for key, values in measured.items()}


def _kind(trial: Trial) -> str:
    """The variant in a run's name, `w128_lora` or what is changed of it."""
    return trial.name.split("-")[1]
