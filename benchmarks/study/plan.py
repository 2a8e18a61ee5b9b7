"""Which runs the study consists of, in which order: a function of the results there are.

Every prefix of the order is informative: each variant's first learning rate before any second one,
then the short ablations, then the final runs of one seed before those of the next.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from study import settings as declared
from study.results import Result, StudyError, differences
from study.settings import Ablation, Settings, Variant
from study.tuning import best_rate, next_rate

STAGES = ("tune", "dip", "final", "ablation")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the study."""

    name: str
    """Of its folder and result."""
    stage: str
    """One of STAGES."""
    settings: Settings | None
    """What it is run with; None while it waits for results of others."""
    waits_for: str = ""
    """What those are."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        lengths = {
            "tune": declared.TUNE_STEPS,
            "dip": declared.DIP_STEPS,
            "final": declared.FINAL_STEPS,
            "ablation": declared.ABLATION_STEPS,
        }
        return lengths[self.stage]


def all_trials(results: Mapping[str, Result]) -> list[Trial]:
    """Every run in order, done or not. Raises StudyError if a result has other settings."""
    trials = [
        *_tuning(results),
        *_ablations(results),
        *_finals(results),
    ]
    for trial in trials:
        result = results.get(trial.name)
        if result is not None and trial.settings is not None:
            require_settings(trial, result.settings, f"the result {trial.name}.json")
    return trials


def unknown_results(results: Mapping[str, Result]) -> list[str]:
    """Results that belong to no declared run; they are never shown."""
    return sorted(set(results) - {trial.name for trial in all_trials(results)})


def require_settings(trial: Trial, found: Settings, what: str) -> None:
    """Raises StudyError unless `found` are the trial's settings."""
    if changed := differences(found, trial.settings or {}):
        raise StudyError(
            f"{what} was made with other settings than declared now ({'; '.join(changed)}); "
            "remove it, so that it is run again"
        )


def tuned_variants() -> list[Variant]:
    """Those with learning rates of their own, full rank first."""
    return [variant for variant in declared.VARIANTS if variant.tuned_as is None]


def tuned_rates(results: Mapping[str, Result], variant: Variant) -> dict[float, float]:
    """Validation loss by learning rate of the variant's tuning runs so far, in the order tried."""
    losses: dict[float, float] = {}
    while (rate := next_rate(losses, variant.first_rate)) is not None:
        result = results.get(_tune_name(variant, rate))
        if result is None:
            break
        losses[rate] = result.loss
    return losses


def chosen_rate(results: Mapping[str, Result], variant: Variant) -> float | None:
    """The best learning rate once the variant's tuning is complete."""
    losses = tuned_rates(results, variant)
    return best_rate(losses) if next_rate(losses, variant.first_rate) is None else None


def settings_of(variant: Variant, rate: float, dense_rate: float | None) -> Settings:
    """A variant's settings at one learning rate; `dense_rate` is that of embeddings and norms."""
    rates: Settings = {variant.rate_key: rate}
    if variant.rate_key != "optimizer.lr":
        rates["optimizer.lr"] = dense_rate
    return declared.COMMON | variant.settings | rates


# -- stages ----------------------------------------------------------------------------------


def _tuning(results: Mapping[str, Result]) -> Iterator[Trial]:
    """The dense rate first, since all others train their dense part with it; then by turns."""
    full, *others = tuned_variants()
    yield from (_tune(results, full, turn) for turn in range(declared.TUNING_RUNS))
    yield from (_dip(variant) for variant in declared.DIP_VARIANTS)
    for turn in range(declared.TUNING_RUNS):
        yield from (_tune(results, variant, turn) for variant in others)


def _tune(results: Mapping[str, Result], variant: Variant, turn: int) -> Trial:
    losses = tuned_rates(results, variant)
    tried = list(losses)
    rate = tried[turn] if turn < len(tried) else None
    if turn == len(tried):
        rate = next_rate(losses, variant.first_rate)
    dense_rate = chosen_rate(results, declared.FULL)
    if rate is None:
        name = f"tune-{variant.name}-try_{turn + 1}"
        return Trial(name=name, stage="tune", settings=None, waits_for="the tries before it")
    name = _tune_name(variant, rate)
    if variant is not declared.FULL and dense_rate is None:
        waits = "the learning rate of full rank, which dense parameters take"
        return Trial(name=name, stage="tune", settings=None, waits_for=waits)
    own = settings_of(variant, rate, dense_rate)
    return Trial(name=name, stage="tune", settings=_sized(own, declared.TUNE_STEPS, seed=0))


def _tune_name(variant: Variant, rate: float) -> str:
    return f"tune-{variant.tuned_as or variant.name}-lr_{rate:g}"


def _dip(variant: Variant) -> Trial:
    own = declared.COMMON | variant.settings | declared.DIP
    return Trial(
        name=f"dip-{variant.name}",
        stage="dip",
        settings=_sized(own, declared.DIP_STEPS, seed=0),
    )


def _finals(results: Mapping[str, Result]) -> Iterator[Trial]:
    """One seed after the other."""
    for seed in declared.SEEDS:
        for variant in declared.VARIANTS:
            if seed in variant.seeds:
                name = f"final-{variant.name}-seed_{seed}"
                yield _after_tuning(results, name, "final", variant, declared.FINAL, seed=seed)


def _ablations(results: Mapping[str, Result]) -> Iterator[Trial]:
    first, other = declared.SEEDS[0], declared.SEEDS[-1]
    yield from (_ablation(results, ablation, first) for ablation in declared.ABLATIONS)
    for ablation in declared.ABLATIONS:
        if ablation.name in declared.CONFIRMED and other != first:
            yield _ablation(results, ablation, other)


def _ablation(results: Mapping[str, Result], ablation: Ablation, seed: int) -> Trial:
    return _after_tuning(
        results,
        ablation.run(seed),
        "ablation",
        ablation.of,
        ablation.settings,
        seed=seed,
        rate_factor=ablation.rate_factor,
    )


def _after_tuning(
    results: Mapping[str, Result],
    name: str,
    stage: str,
    variant: Variant,
    changes: Settings,
    *,
    seed: int = 0,
    rate_factor: float = 1.0,
) -> Trial:
    rate, dense_rate = (chosen_rate(results, v) for v in (variant, declared.FULL))
    if rate is None or dense_rate is None:
        waits = f"the tuning of {variant.title}"
        return Trial(name=name, stage=stage, settings=None, waits_for=waits)
    own = settings_of(variant, float(f"{rate * rate_factor:.3g}"), dense_rate) | changes
    steps = Trial(name=name, stage=stage, settings=None).steps
    return Trial(name=name, stage=stage, settings=_sized(own, steps, seed=seed))


def _sized(own: Settings, steps: int, *, seed: int) -> Settings:
    return own | {"train.steps": steps, "train.seed": seed}
