"""The tables of the second study's page, as Markdown, from results alone."""

from collections.abc import Mapping, Sequence

from study.markdown import NOTHING, difference, number, table
from study.results import Result
from study.settings import TUNING_RUNS, Variant
from study.tuning import at_edge, best_rate

from study2 import settings as declared
from study2.axes import (
    at,
    complete,
    finals,
    mean,
    mean_loss,
    over_seconds,
    seconds_per_step,
    state_bytes,
)
from study2.plan import STAGES, all_trials, final_name, group, width_of
from study2.settings import Change

TIMES = (0.25, 0.5, 0.75)
"""Fractions of dense training's processor time at which losses are compared."""


def progress_table(results: Mapping[str, Result]) -> str:
    """Runs done and declared by width and stage."""
    trials, rows = all_trials(results), []
    for width in declared.VARIANTS:
        for stage in STAGES:
            of = [t for t in trials if t.stage == stage and width_of(t) == width]
            done = sum(trial.name in results for trial in of)
            if of:
                rows.append([str(width), stage, f"{of[0].steps:,}", str(done), str(len(of))])
    return table(["width", "stage", "steps a run", "done", "declared"], rows)


def missing_runs(results: Mapping[str, Result]) -> str:
    """The names of all runs that are not done, by stage."""
    lines = []
    for stage in STAGES:
        trials = [t for t in all_trials(results) if t.stage == stage]
        names = [f"`{trial.name}`" for trial in trials if trial.name not in results]
        if names:
            lines.append(f"- {stage} ({len(names)}): {', '.join(names)}")
    return "\n".join(lines) if lines else "None: every declared run is done."


def finals_table(results: Mapping[str, Result], width: int) -> str:
    """Loss by seed at equal tokens, and what is lost against dense AdamW and gained on SST."""
    variants = declared.VARIANTS[width]
    reference = {name: _named(results, width, name) for name in (declared.FULL, declared.SST)}
    gap = _minus(reference[declared.SST], reference[declared.FULL])
    rows = []
    for variant in variants:
        loss = mean_loss(results, variant)
        lost = _minus(loss, reference[declared.FULL])
        part = NOTHING if lost is None or not gap else f"{lost / gap:.2f}"
        rate = group(width).chosen_rate(results, variant)
        rows.append(
            [
                variant.title,
                NOTHING if rate is None else f"{rate:g}",
                *(_of_seed(results, variant, seed) for seed in declared.SEEDS),
                number(loss),
                difference(loss, reference[declared.FULL]),
                _range(results, variant, variants[0]),
                part,
            ]
        )
    seeds = [f"seed {seed}" for seed in declared.SEEDS]
    head = ["variant", "rate", *seeds, "mean", "- dense AdamW", "by seed", "of SST's gap"]
    return table(head, rows)


def time_table(results: Mapping[str, Result], width: int) -> str:
    """Loss at equal processor time: at fractions of what dense AdamW took for all of its steps."""
    full = complete(results, declared.VARIANTS[width][0])
    curves = [over_seconds(run) for run in full]
    whole = mean([curve[-1][0] if curve else None for curve in curves])
    step = mean([seconds_per_step(run) for run in full])
    rows = []
    for variant in declared.VARIANTS[width]:
        runs = complete(results, variant)
        own = mean([seconds_per_step(run) for run in runs])
        ratio = NOTHING if own is None or not step else f"{own / step:.2f}"
        places = [None if whole is None else whole * part for part in TIMES]
        rows.append(
            [
                variant.title,
                NOTHING if own is None else f"{own:.3f}",
                ratio,
                *(number(_at_time(runs, place)) for place in places),
                number(mean_loss(results, variant)),
            ]
        )
    marks = [f"loss at {part:g} of dense time" for part in TIMES]
    return table(["variant", "s a step", "/ dense", *marks, "at its own end"], rows)


def bytes_table(results: Mapping[str, Result]) -> str:
    """Bytes of training state and loss of every variant at every width."""
    rows = []
    for variant in declared.VARIANTS[declared.WIDTH]:
        cells = [variant.title]
        for width in sorted(declared.VARIANTS):
            found = [v for v in declared.VARIANTS[width] if v.title == variant.title]
            runs = finals(results, found[0]) if found else []
            held = state_bytes(runs[0]) if runs else None
            cells.append(NOTHING if held is None else f"{held / 1e6:.2f}")
            cells.append(number(mean_loss(results, found[0]) if found else None))
        rows.append(cells)
    columns = [text for w in sorted(declared.VARIANTS) for text in (f"MB, {w}", f"loss, {w}")]
    return table(["variant", *columns], rows)


def rank_table(results: Mapping[str, Result]) -> str:
    """Loss minus dense AdamW's at width 128, by rank."""
    full = _named(results, declared.WIDTH, declared.FULL)
    own = declared.WIDTH // declared.RANK_FRACTION
    ranks = sorted({*declared.RANKS, own})
    rows = []
    for name in declared.RANKED:
        variant = declared.variant(name, declared.WIDTH)
        losses = {own: mean_loss(results, variant)}
        for change in declared.RANK_CHANGES:
            if change.of == name:
                losses[change.settings["spectral.spectral_rank"]] = changed_loss(results, change)
        rows.append([variant.title, *(difference(losses.get(r), full) for r in ranks)])
    head = [f"r/d = 1/{declared.WIDTH // rank}" for rank in ranks]
    return table(["loss - dense AdamW", *head], rows)


def ablation_table(results: Mapping[str, Result]) -> str:
    """Loss of each change minus that of the unchanged run of the same seed."""
    rows = []
    for change in declared.ABLATIONS:
        variant = declared.variant(change.of, declared.WIDTH)
        seed = change.seeds[0]
        run, base = results.get(change.run(seed)), results.get(final_name(variant, seed))
        loss, other = (None if r is None else r.loss for r in (run, base))
        rows.append([variant.title, change.title, number(loss), difference(loss, other)])
    return table(["variant", "change", f"loss, seed {declared.SEEDS[0]}", "- unchanged"], rows)


def tuning_table(results: Mapping[str, Result]) -> str:
    """Loss at every rate tried, the best one in bold."""
    rows = []
    for width, variants in declared.VARIANTS.items():
        for variant in variants:
            losses = group(width).tuned_rates(results, variant)
            chosen = group(width).chosen_rate(results, variant)
            best = best_rate(losses) if losses else None
            tried = [
                f"**{rate:g}: {number(loss)}**" if rate == best else f"{rate:g}: {number(loss)}"
                for rate, loss in sorted(losses.items())
            ]
            state = "open" if chosen is None else "chosen"
            if chosen is not None and at_edge(losses):
                state = "chosen at an edge"
            rows.append([str(width), variant.title, ", ".join(tried) or NOTHING, state])
    return table(["width", "variant", f"rates tried (at least {TUNING_RUNS})", "state"], rows)


def changed_loss(results: Mapping[str, Result], change: Change) -> float | None:
    """Mean over the seeds of a change; None until every one is done."""
    runs = [results.get(change.run(seed)) for seed in change.seeds]
    return mean([None if run is None else run.loss for run in runs])


def _named(results: Mapping[str, Result], width: int, name: str) -> float | None:
    found = [v for v in declared.VARIANTS[width] if v.name == f"w{width}_{name}"]
    return mean_loss(results, found[0]) if found else None


def _of_seed(results: Mapping[str, Result], variant: Variant, seed: int) -> str:
    run = results.get(final_name(variant, seed))
    return number(None if run is None else run.loss)


def _range(results: Mapping[str, Result], variant: Variant, full: Variant) -> str:
    """The smallest and the largest difference to dense AdamW of the same seed."""
    pairs = zip(complete(results, variant), complete(results, full), strict=False)
    lost = sorted(run.loss - dense.loss for run, dense in pairs)
    return f"{lost[0]:+.4f} to {lost[-1]:+.4f}" if lost else NOTHING


def _at_time(runs: Sequence[Result], place: float | None) -> float | None:
    return None if place is None else mean([at(over_seconds(run), place) for run in runs])


def _minus(loss: float | None, other: float | None) -> float | None:
    return None if loss is None or other is None else loss - other
