"""What is done, what is left, and about how long that takes."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from study.plan import all_trials
from study.results import Result
from study.trial import Trial, undeclared

SECONDS_PER_STEP = 0.25
"""On one core, where nothing has been measured yet."""
OVERHEAD = 1.15
"""Evaluations, checkpoints and starts, on top of the steps."""


def listing(results: Mapping[str, Result], *, workers: int) -> str:
    """A line a run, then what is left in runs, tokens and hours."""
    speed = seconds_per_step(results)
    return list_trials(all_trials(results), results, workers, lambda t: _seconds(t, speed))


def list_trials(
    trials: Sequence[Trial],
    results: Mapping[str, Result],
    workers: int,
    seconds_of: Callable[[Trial], float],
) -> str:
    """The listing of any study, whose runs take about `seconds_of` on one core."""
    lines = [_line(trial, results, seconds_of(trial)) for trial in trials]
    left = [trial for trial in trials if trial.name not in results]
    steps = sum(trial.steps for trial in left)
    hours = sum(map(seconds_of, left)) / workers / 3600
    lines.append(
        f"{len(trials) - len(left)} of {len(trials)} runs are done; left: {len(left)} runs, "
        f"{steps:,} steps, about {hours:.1f} h with {workers} worker(s)"
    )
    if foreign := undeclared(trials, results):
        lines.append(f"results of no declared run, never shown: {', '.join(foreign)}")
    return "\n".join(lines)


def seconds_per_step(results: Mapping[str, Result]) -> dict[str, float]:
    """Measured mean by kind of run; "" holds that of all, or a guess without any."""
    measured = defaultdict(list)
    for name, result in results.items():
        steps = result.training[-1][0] if result.training else 0
        if steps and (seconds := result.facts.get("train_seconds")):
            measured[_kind(name)].append(seconds / steps)
    everything = [value for values in measured.values() for value in values] or [SECONDS_PER_STEP]
    means = {kind: sum(values) / len(values) for kind, values in measured.items()}
    return means | {"": sum(everything) / len(everything)}


def _kind(name: str) -> str:
    """The variant in a run's name; ablations are all of one kind."""
    stage, _, rest = name.partition("-")
    return stage if stage == "ablation" else rest.partition("-")[0]


def _seconds(trial: Trial, speed: Mapping[str, float]) -> float:
    return trial.steps * speed.get(_kind(trial.name), speed[""]) * OVERHEAD


def _line(trial: Trial, results: Mapping[str, Result], seconds: float) -> str:
    result = results.get(trial.name)
    if result is not None:
        state = "diverged" if result.diverged else f"done, validation loss {result.loss:.4f}"
    else:
        state = f"left, about {seconds / 60:.0f} min"
        state += f", waits for {trial.waits_for}" if trial.waits_for else ""
    return f"{trial.name:<44} {trial.steps:>6} steps  {state}"
