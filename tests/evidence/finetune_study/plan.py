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
    """tune or final."""
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
    """Every run in order: tuning of methods alone, of variants, then the other seeds.

    Runs that wait for a choice are left out until it is made.
    """
    for method, variant in pairs():
        yield from tuning(method, variant, results)
    for seed in declared.SEEDS[1:]:
        for method, variant in pairs():
            yield from final(method, variant, results, seed)


def tuning(method: Method, variant: Variant, results: Mapping[str, Result]) -> list[Trial]:
    """One run with the first seed for each value that is tried; none before it is known which."""
    if variant is declared.NONE:
        rate: float | None = method.first_rate
    else:
        best = chosen(method, declared.NONE, results)
        rate = None if best is None else float(best.settings[method.rate_key])
    if rate is None:
        return []
    if variant.key is not None:
        changes = [{method.rate_key: rate, variant.key: value} for value in variant.tuned]
    else:
        changes = [{method.rate_key: float(f"{rate * f:.3g}")} for f in variant.tuned]
    return [_tune(method, variant, change) for change in changes]


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


def _tune(method: Method, variant: Variant, change: Settings) -> Trial:
    nodes = {} if variant is declared.NONE else {"filter.nodes": method.nodes}
    own = declared.COMMON | method.settings | variant.settings | nodes | change
    key = variant.key or method.rate_key
    shown = f"{'lr' if variant.key is None else key.rpartition('.')[2]}_{change[key]:g}"
    return Trial(
        name=f"tune-{method.name}-{variant.name}-{shown}",
        stage="tune",
        settings=own | {"train.seed": declared.SEEDS[0]},
    )
