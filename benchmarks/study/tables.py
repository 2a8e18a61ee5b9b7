"""The tables of the page, as Markdown, from results alone. What was not measured is a dash."""

import math
from collections.abc import Mapping, Sequence

from study import settings as declared
from study.dip import DIP_WINDOW, dip_ratios
from study.markdown import NOTHING, difference, number, table
from study.plan import STAGES, all_trials, chosen_rate, tuned_rates, tuned_variants
from study.results import Result
from study.settings import TOKENS_PER_STEP, Variant
from study.tuning import at_edge, best_rate


def progress_table(results: Mapping[str, Result]) -> str:
    """Runs done and declared by stage."""
    trials = all_trials(results)
    rows = []
    for stage in STAGES:
        declared_runs = [trial for trial in trials if trial.stage == stage]
        done = [trial for trial in declared_runs if trial.name in results]
        tokens = declared_runs[0].steps * TOKENS_PER_STEP
        rows.append([stage, f"{tokens / 1e6:.2f} M", str(len(done)), str(len(declared_runs))])
    return table(["stage", "tokens a run", "done", "declared"], rows)


def missing_runs(results: Mapping[str, Result]) -> str:
    """The names of all runs that are not done, by stage."""
    lines = []
    for stage in STAGES:
        names = [
            f"`{trial.name}`"
            for trial in all_trials(results)
            if trial.stage == stage and trial.name not in results
        ]
        if names:
            lines.append(f"- {stage} ({len(names)}): {', '.join(names)}")
    return "\n".join(lines) if lines else "None: every declared run is done."


def tuning_table(results: Mapping[str, Result]) -> str:
    """Validation loss at every learning rate tried; the chosen one in bold."""
    rows = []
    for variant in tuned_variants():
        losses = tuned_rates(results, variant)
        chosen = chosen_rate(results, variant)
        cells = [_tried(rate, loss, rate == chosen) for rate, loss in losses.items()]
        cells += [NOTHING] * (declared.TUNING_RUNS - len(cells))
        rows.append([variant.title, *cells, _tuning_note(losses, chosen)])
    tries = [f"try {n + 1}" for n in range(declared.TUNING_RUNS)]
    return table(["variant", *tries, "chosen"], rows)


def finals_table(results: Mapping[str, Result]) -> str:
    """Validation loss and perplexity at the end, by seed; the difference to full rank with the same
    epsilon."""
    rows = []
    for variant in _final_variants():
        dense = [v for v in declared.VARIANTS if v.rank is None and v.epsilon == variant.epsilon]
        full = mean_loss(results, dense[0]) if dense else None
        runs = [final(results, variant, seed) for seed in declared.SEEDS]
        mean = mean_loss(results, variant)
        rows.append(
            [
                variant.title,
                _rate(chosen_rate(results, variant)),
                _count(runs),
                *(_loss(run) for run in runs),
                number(mean),
                number(None if mean is None else _perplexity(mean), digits=1),
                difference(mean, full),
            ]
        )
    head = ["variant", "learning rate", "trained", *(f"seed {s}" for s in declared.SEEDS)]
    return table([*head, "mean loss", "perplexity", "loss - full"], rows)


def curve_table(results: Mapping[str, Result]) -> str:
    """Mean validation loss of the final runs at each quarter of the tokens."""
    quarters = [declared.FINAL_STEPS * n // 4 for n in (1, 2, 3, 4)]
    rows = []
    for variant in _final_variants():
        runs = [final(results, variant, seed) for seed in variant.seeds]
        curves = [run.validation for run in runs if run is not None]
        means = (_mean_at(curves, step) if len(curves) == len(runs) else None for step in quarters)
        rows.append([variant.title, *map(number, means)])
    head = [f"{step * TOKENS_PER_STEP / 1e6:.1f} M tokens" for step in quarters]
    return table(["variant", *head], rows)


def ablation_table(results: Mapping[str, Result]) -> str:
    """Loss of each change and its difference to the unchanged run of the same length and seed."""
    rows = []
    for ablation in declared.ABLATIONS:
        cells = [ablation.question, ablation.title]
        for seed in declared.SEEDS:
            pair = (ablation, declared.BASES[ablation.of.name])
            run, base = (results.get(a.run(seed)) for a in pair)
            cells += [_loss(run), difference(_loss_of(run), _loss_of(base))]
        rows.append(cells)
    columns = (text for seed in declared.SEEDS for text in (f"loss, seed {seed}", "- base"))
    return table(["question", "change", *columns], rows)


def dip_table(results: Mapping[str, Result]) -> str:
    """Gradient norm just after a boundary over that before it."""
    rows = []
    for variant in declared.DIP_VARIANTS:
        ratios = dip_ratios(results.get(f"dip-{variant.name}"))
        if ratios is None:
            rows.append([variant.title, NOTHING, NOTHING, NOTHING])
        else:
            first, window = ratios
            rows.append([variant.title, str(len(first)), _range(first), _range(window)])
    head = ["variant", "boundaries", "first step after", f"mean of {DIP_WINDOW} steps after"]
    return table(head, rows)


def _final_variants() -> list[Variant]:
    return [variant for variant in declared.VARIANTS if variant.seeds]


def final(results: Mapping[str, Result], variant: Variant, seed: int) -> Result | None:
    """The final run of one seed, if it is done."""
    return results.get(f"final-{variant.name}-seed_{seed}")


def mean_loss(results: Mapping[str, Result], variant: Variant) -> float | None:
    """Mean over the variant's seeds; None until every one is done."""
    losses = [run.loss for seed in variant.seeds if (run := final(results, variant, seed))]
    return sum(losses) / len(losses) if losses and len(losses) == len(variant.seeds) else None


def _mean_at(curves: Sequence[Sequence[tuple[int, float]]], step: int) -> float | None:
    found = [loss for curve in curves for at, loss in curve if at == step]
    return sum(found) / len(found) if found and len(found) == len(curves) else None


def _tried(rate: float, loss: float, chosen: bool) -> str:
    text = f"{rate:g}: {'diverged' if math.isinf(loss) else f'{loss:.4f}'}"
    return f"**{text}**" if chosen else text


def _tuning_note(losses: Mapping[float, float], chosen: float | None) -> str:
    if chosen is None:
        return f"open; best so far {best_rate(losses):g}" if losses else "open"
    return f"{chosen:g}" + (" (at the edge of what was tried)" if at_edge(losses) else "")


def _count(runs: Sequence[Result | None]) -> str:
    counts = {run.facts.get("parameters_trained") for run in runs if run is not None}
    return f"{counts.pop():,}" if len(counts) == 1 else NOTHING


def _loss_of(run: Result | None) -> float | None:
    return None if run is None else run.loss


def _loss(run: Result | None) -> str:
    return number(_loss_of(run))


def _rate(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate:g}"


def _perplexity(loss: float) -> float:
    return math.exp(loss) if math.isfinite(loss) else math.inf


def _range(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"
