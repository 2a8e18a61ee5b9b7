"""Which runs the study consists of, in which order: a function of the results there are.

Every prefix of the order is informative: each variant's first learning rate before any second one,
then the short ablations, then the final runs of one seed before those of the next.
"""

from collections.abc import Iterator, Mapping

from study import settings as declared
from study.group import Group, sized
from study.results import Result
from study.settings import Ablation, Settings, Variant
from study.trial import Trial, checked, undeclared

STAGES = ("tune", "dip", "final", "ablation")


def group() -> Group:
    """All variants: there is one model."""
    return Group(full=declared.FULL, common=declared.COMMON, tune_steps=declared.TUNE_STEPS)


def all_trials(results: Mapping[str, Result]) -> list[Trial]:
    """Every run in order, done or not. Raises StudyError if a result has other settings."""
    return checked([*_tuning(results), *_ablations(results), *_finals(results)], results)


def unknown_results(results: Mapping[str, Result]) -> list[str]:
    """Results that belong to no declared run; they are never shown."""
    return undeclared(all_trials(results), results)


def tuned_variants() -> list[Variant]:
    """Those with learning rates of their own, full rank first."""
    return [variant for variant in declared.VARIANTS if variant.tuned_as is None]


def tuned_rates(results: Mapping[str, Result], variant: Variant) -> dict[float, float]:
    """Validation loss by learning rate of the variant's tuning runs so far, in the order tried."""
    return group().tuned_rates(results, variant)


def chosen_rate(results: Mapping[str, Result], variant: Variant) -> float | None:
    """The best learning rate once the variant's tuning is complete."""
    return group().chosen_rate(results, variant)


def settings_of(variant: Variant, rate: float, dense_rate: float | None) -> Settings:
    """A variant's settings at one learning rate; `dense_rate` is that of embeddings and norms."""
    return group().settings_of(variant, rate, dense_rate)


# -- stages ----------------------------------------------------------------------------------


def _tuning(results: Mapping[str, Result]) -> Iterator[Trial]:
    """The dense rate first, since all others train their dense part with it; then by turns."""
    full, *others = tuned_variants()
    yield from _turns(results, [full])
    yield from (_dip(variant) for variant in declared.DIP_VARIANTS)
    yield from _turns(results, others)


def _turns(results: Mapping[str, Result], variants: list[Variant]) -> Iterator[Trial]:
    for turn in range(declared.TUNING_RUNS):
        for variant in variants:
            trial = group().tune(results, variant, turn)
            if trial is not None:
                yield trial


def _dip(variant: Variant) -> Trial:
    own = declared.COMMON | variant.settings | declared.DIP
    steps = declared.DIP_STEPS
    settings = sized(own, steps, seed=0)
    return Trial(name=f"dip-{variant.name}", stage="dip", steps=steps, settings=settings)


def _finals(results: Mapping[str, Result]) -> Iterator[Trial]:
    """One seed after the other."""
    steps, changes = declared.FINAL_STEPS, declared.FINAL
    for seed in declared.SEEDS:
        for variant in declared.VARIANTS:
            if seed in variant.seeds:
                name = f"final-{variant.name}-seed_{seed}"
                yield group().after_tuning(
                    results, name, "final", variant, changes, steps=steps, seed=seed
                )


def _ablations(results: Mapping[str, Result]) -> Iterator[Trial]:
    first, other = declared.SEEDS[0], declared.SEEDS[-1]
    yield from (_ablation(results, ablation, first) for ablation in declared.ABLATIONS)
    for ablation in declared.ABLATIONS:
        if ablation.name in declared.CONFIRMED and other != first:
            yield _ablation(results, ablation, other)


def _ablation(results: Mapping[str, Result], ablation: Ablation, seed: int) -> Trial:
    return group().after_tuning(
        results,
        ablation.run(seed),
        "ablation",
        ablation.of,
        ablation.settings,
        steps=declared.ABLATION_STEPS,
        seed=seed,
        rate_factor=ablation.rate_factor,
    )
