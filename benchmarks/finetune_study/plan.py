"""Which runs the study consists of, in which order: a function of the results there are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from study.results import Result

from finetune_study import settings as declared
from finetune_study.settings import Method, Settings, Variant, possible


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the study."""

    name: str
    """Of its folder and result."""
    stage: str
    """tune, final or few."""
    settings: Settings
    """What it is run with."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.settings["train.steps"])


def pairs() -> list[tuple[Method, Variant]]:
    """Every combination that can run, methods alone first."""
    return [(m, v) for v in declared.VARIANTS for m in declared.METHODS if possible(m, v)]


def all_trials(results: Mapping[str, Result]) -> Iterator[Trial]:
    """Every run in order: tuning of methods alone; one method after another its variants' tuning
    and all other seeds; fewer examples.

    Runs that wait for a choice are left out until it is made.
    """
    for method in declared.METHODS:
        yield from tuning(method, declared.NONE, results)
    for method in declared.METHODS:
        variants = [v for v in declared.VARIANTS if possible(method, v)]
        for variant in variants[1:]:
            yield from tuning(method, variant, results)
        for seed in declared.SEEDS[1:]:
            for variant in variants:
                yield from final(method, variant, results, seed)
    for examples in declared.FEW_EXAMPLES:
        for method in declared.METHODS:
            yield from few(method, examples, results)


def tuning(method: Method, variant: Variant, results: Mapping[str, Result]) -> list[Trial]:
    """One run with the first seed for each value that is tried; none before it is known which.

    While the best of several rates lies at an end, one beyond it is tried (up to `WIDER` of them).
    """
    rate = _middle_rate(method, variant, results)
    if rate is None:
        return []
    values = variant.tuned if variant.key else [_rounded(rate * f) for f in variant.tuned]
    trials = {value: _tune(method, variant, rate, value) for value in values}
    for _ in range(0 if variant.key or variant.control else declared.WIDER):
        if any(trial.name not in results for trial in trials.values()):
            break
        beyond = _beyond(trials, results)
        if beyond is None:
            break
        trials[beyond] = _tune(method, variant, rate, beyond)
    return list(trials.values())


def _middle_rate(method: Method, variant: Variant, results: Mapping[str, Result]) -> float | None:
    """The rate that values are taken around: the best of the method alone, or of its filter."""
    if variant is declared.NONE:
        return method.first_rate
    best = chosen(method, declared.FILTER if variant.control else declared.NONE, results)
    return None if best is None else float(best.settings[method.rate_key])


def _beyond(trials: Mapping[float, Trial], results: Mapping[str, Result]) -> float | None:
    """The value to try next, None if the best one has neighbours on both sides."""
    best = min(trials, key=lambda value: results[trials[value].name].loss)
    values = sorted(trials)
    if best == values[-1]:
        return _rounded(best * best / values[-2])
    return _rounded(best * best / values[1]) if best == values[0] else None


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def chosen(method: Method, variant: Variant, results: Mapping[str, Result]) -> Trial | None:
    """The tuning run with the lowest loss, once all of them are done."""
    tried = tuning(method, variant, results)
    if not tried or any(trial.name not in results for trial in tried):
        return None
    return min(tried, key=lambda trial: results[trial.name].loss)


def final(
    method: Method, variant: Variant, results: Mapping[str, Result], seed: int
) -> Iterator[Trial]:
    """The run of another seed with the tuned settings, once they are known."""
    best = chosen(method, variant, results)
    if best is not None:
        name = f"final-{method.name}-{variant.name}-seed_{seed}"
        yield Trial(name=name, stage="final", settings=best.settings | {"train.seed": seed})


def by_seed(method: Method, variant: Variant, results: Mapping[str, Result]) -> list[Result]:
    """Results with the tuned settings, by seed; those that are done."""
    best = chosen(method, variant, results)
    if best is None:
        return []
    finals = (t for s in declared.SEEDS[1:] for t in final(method, variant, results, s))
    return [results[t.name] for t in (best, *finals) if t.name in results]


def few(method: Method, examples: int, results: Mapping[str, Result]) -> list[Trial]:
    """The runs of a method alone on fewer examples, a seed each, once its rate is known."""
    best = chosen(method, declared.NONE, results)
    if best is None:
        return []
    return [
        Trial(
            name=f"few-{method.name}-{examples}-seed_{seed}",
            stage="few",
            settings=best.settings | {"data.examples": examples, "train.seed": seed},
        )
        for seed in declared.SEEDS
    ]


def _tune(method: Method, variant: Variant, rate: float, value: float) -> Trial:
    nodes = {} if variant is declared.NONE else {"filter.nodes": method.nodes}
    key = variant.key or method.rate_key
    tuned = {method.rate_key: rate} | {key: value}
    own = declared.COMMON | method.settings | variant.settings | nodes | tuned
    shown = f"{'lr' if variant.key is None else key.rpartition('.')[2]}_{value:g}"
    return Trial(
        name=f"tune-{method.name}-{variant.name}-{shown}",
        stage="tune",
        settings=own | {"train.seed": declared.SEEDS[0]},
    )
