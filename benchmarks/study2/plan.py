"""Which runs the second study consists of, in which order.

Every prefix is informative: width 128 first, and there the variants that answer the question (their
tuning, then one seed after the other), then the others, then changes of rank and settings; then
width 64 and width 256.
"""

from collections.abc import Iterator, Mapping, Sequence

from study.group import Group
from study.results import Result
from study.settings import TUNING_RUNS, Variant
from study.trial import Trial, checked

from study2 import settings as declared
from study2.settings import Change

STAGES = ("tune", "final", "rank", "ablation")


def group(width: int) -> Group:
    """The variants of one width: dense parameters take the rate of its dense training."""
    return Group(
        full=declared.VARIANTS[width][0],
        common=declared.common(width),
        tune_steps=declared.TUNE_STEPS,
        tune_changes=declared.TUNE,
        most=declared.MOST_RATES,
    )


def all_trials(results: Mapping[str, Result]) -> list[Trial]:
    """Every run in order, done or not. Raises StudyError if a result has other settings."""
    main, *others = declared.VARIANTS
    first, *more = declared.SEEDS
    core = {declared.variant(name, main).name for name in declared.CORE}
    of_main = declared.VARIANTS[main]
    trials: list[Trial] = []
    for variants in (
        [v for v in of_main if v.name in core],
        [v for v in of_main if v.name not in core],
    ):
        trials += [*_tuning(results, main, variants), *_finals(results, main, variants)]
    trials += _changes(results, "rank", declared.RANK_CHANGES, [first])
    trials += _changes(results, "ablation", declared.ABLATIONS, [first])
    trials += _changes(results, "rank", declared.RANK_CHANGES, more)
    for width in others:
        variants = declared.VARIANTS[width]
        trials += [*_tuning(results, width, variants), *_finals(results, width, variants)]
    return checked(trials, results)


def _tuning(
    results: Mapping[str, Result], width: int, variants: Sequence[Variant]
) -> Iterator[Trial]:
    """The dense rate first; then each variant's first rate before any second one, and so on."""
    full = declared.VARIANTS[width][0]
    if full in variants:
        yield from _turns(results, width, [full])
    yield from _turns(results, width, [variant for variant in variants if variant != full])


def _turns(
    results: Mapping[str, Result], width: int, variants: Sequence[Variant]
) -> Iterator[Trial]:
    for turn in range(max(TUNING_RUNS, declared.MOST_RATES)):
        for variant in variants:
            trial = group(width).tune(results, variant, turn)
            if trial is not None:
                yield trial


def _finals(
    results: Mapping[str, Result], width: int, variants: Sequence[Variant]
) -> Iterator[Trial]:
    """One seed after the other."""
    for seed in declared.SEEDS:
        for variant in variants:
            if seed in variant.seeds:
                name = final_name(variant, seed)
                changes, steps = declared.FINAL, declared.FINAL_STEPS
                yield group(width).after_tuning(
                    results, name, "final", variant, changes, steps=steps, seed=seed
                )


def final_name(variant: Variant, seed: int) -> str:
    """The name of a variant's run to the end."""
    return f"final-{variant.name}-seed_{seed}"


def _changes(
    results: Mapping[str, Result], stage: str, changes: Sequence[Change], seeds: Sequence[int]
) -> Iterator[Trial]:
    width = next(iter(declared.VARIANTS))
    by_name = {v.name: v for v in declared.VARIANTS[width]}
    for seed in seeds:
        for change in changes:
            variant = by_name.get(f"w{width}_{change.of}")
            if variant is not None and seed in change.seeds:
                yield group(width).after_tuning(
                    results,
                    change.run(seed),
                    stage,
                    variant,
                    declared.FINAL | change.settings,
                    steps=declared.FINAL_STEPS,
                    seed=seed,
                )


def width_of(trial: Trial) -> int:
    """The width of a run's model, also while it waits."""
    width = next(iter(declared.VARIANTS))
    found = (w for w in declared.VARIANTS if f"-w{w}_" in trial.name)
    return next(found, width)
