"""One run of a study, and the rules for the results of its runs; every study plans in these."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from study.results import Result, StudyError, differences
from study.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a study."""

    name: str
    """Of its folder and result."""
    stage: str
    """The part of the study that it belongs to."""
    steps: int
    """Optimizer steps of the whole run."""
    settings: Settings | None
    """What it is run with; None while it waits for results of others."""
    waits_for: str = ""
    """What those are."""


Plan = Callable[[Mapping[str, Result]], list[Trial]]
"""Every run of a study in order, done or not, from the results there are."""


def checked(trials: Sequence[Trial], results: Mapping[str, Result]) -> list[Trial]:
    """The trials. Raises StudyError if a result of one has other settings than are declared."""
    for trial in trials:
        result = results.get(trial.name)
        if result is not None and trial.settings is not None:
            require_settings(trial, result.settings, f"the result {trial.name}.json")
    return list(trials)


def undeclared(trials: Sequence[Trial], results: Mapping[str, Result]) -> list[str]:
    """Results that belong to no declared run; they are never shown."""
    return sorted(set(results) - {trial.name for trial in trials})


def require_settings(trial: Trial, found: Settings, what: str) -> None:
    """Raises StudyError unless `found` are the trial's settings."""
    if changed := differences(found, trial.settings or {}):
        raise StudyError(
            f"{what} was made with other settings than declared now ({'; '.join(changed)}); "
            "remove it, so that it is run again"
        )
