"""docs/finetune_study.md between its markers, and its plots, from results alone."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from study.results import Result

from finetune_study import settings as declared
from finetune_study.plan import all_trials, by_seed, chosen, few, tuning
from finetune_study.settings import Method, Variant, possible
from spectral_scale.metrics.plots import RUN_COLORS

NOTHING = "–"
SECTION = "<!-- {0} -->\n{1}\n<!-- /{0} -->"


def render(results: Mapping[str, Result], docs: Path) -> list[str]:
    """Write tables and plots; the names of the files written."""
    page = docs / "finetune_study.md"
    text = page.read_text(encoding="utf-8")
    tables = {
        "progress": progress(results),
        "losses": losses_table(results),
        "changes": changes_table(results),
        "tuning": tuning_table(results),
        "counts": counts_table(results),
        "few": few_table(results),
    }
    for name, table in tables.items():
        block = SECTION.format(name, table)
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
    figure = docs / "finetune_study" / "curves.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(results, figure)
    return [str(page), str(figure)]


def progress(results: Mapping[str, Result]) -> str:
    """How much of the study is done."""
    known = list(all_trials(results))
    done = sum(trial.name in results for trial in known)
    complete = done == len(known) and all(
        len(by_seed(m, v, results)) == len(declared.SEEDS) for m, v in _possible()
    )
    state = "complete" if complete else "not complete: tables show what is done"
    return f"{done} runs are done; the study is {state}."


def losses_table(results: Mapping[str, Result]) -> str:
    """Mean validation loss and its standard deviation over seeds, method by variant."""
    head = ["", *(variant.title for variant in declared.VARIANTS)]
    rows = [
        [method.title, *(_mean(method, variant, results) for variant in declared.VARIANTS)]
        for method in declared.METHODS
    ]
    return _table(head, rows)


def changes_table(results: Mapping[str, Result]) -> str:
    """Loss with a variant minus that without the filter, seed by seed: mean, smallest, largest."""
    others = declared.VARIANTS[1:]
    rows = [
        [method.title, *(_change(method, variant, results) for variant in others)]
        for method in declared.METHODS
    ]
    return _table(["", *(variant.title for variant in others)], rows)


def tuning_table(results: Mapping[str, Result]) -> str:
    """Every value tried with its validation loss, the chosen one in bold."""
    rows = []
    for method, variant in _possible():
        best = chosen(method, variant, results)
        key = variant.key or method.rate_key
        cells = []
        for trial in sorted(tuning(method, variant, results), key=lambda t: t.settings[key]):
            if trial.name in results:
                text = f"{trial.settings[key]:g}: {_number(results[trial.name].loss)}"
                cells.append(f"**{text}**" if best is not None and trial == best else text)
        rows.append([method.title, variant.title, f"`{key}`", ", ".join(cells) or NOTHING])
    return _table(["method", "variant", "tuned", "value: loss"], rows)


def counts_table(results: Mapping[str, Result]) -> str:
    """Trained parameters of each method, and processor seconds of its runs."""
    rows = []
    for method in declared.METHODS:
        runs = by_seed(method, declared.NONE, results)
        counts = {run.facts["parameters_trained"] for run in runs}
        seconds = [run.facts["processor_seconds"] for run in runs]
        count = f"{counts.pop():,}" if len(counts) == 1 else NOTHING
        rows.append([method.title, count, f"{statistics.median(seconds):.0f}" if seconds else "–"])
    return _table(["method", "trained", "processor seconds a run"], rows)


def few_table(results: Mapping[str, Result]) -> str:
    """Loss at the end, and the lowest on the way, of methods alone on fewer examples."""
    head = ["examples", *(method.title for method in declared.METHODS)]
    rows = [
        [f"{examples}", *(_few(method, examples, results) for method in declared.METHODS)]
        for examples in declared.FEW_EXAMPLES
    ]
    return _table(head, rows)


def _few(method: Method, examples: int, results: Mapping[str, Result]) -> str:
    done = [results[t.name] for t in few(method, examples, results) if t.name in results]
    if not done:
        return NOTHING
    lowest = statistics.fmean(min(loss for _, loss in run.validation) for run in done)
    return f"{_spread([run.loss for run in done])}; lowest {lowest:.4f}"


def draw_curves(results: Mapping[str, Result], path: Path) -> None:
    """Mean validation loss against steps: methods without the filter, then each with variants."""
    figure = Figure(figsize=(11.0, 6.0), layout="constrained", dpi=110)
    axes = figure.subplots(2, 3).flat
    first = next(axes)
    first.set_title("no filter")
    for method, color in zip(declared.METHODS, RUN_COLORS, strict=False):
        _draw(first, by_seed(method, declared.NONE, results), method.title, color)
    for method in declared.METHODS:
        panel = next(axes)
        panel.set_title(method.title)
        for variant, color in zip(declared.VARIANTS, RUN_COLORS, strict=False):
            if possible(method, variant):
                _draw(panel, by_seed(method, variant, results), variant.title, color)
    last = next(axes)
    last.set_title(f"no filter, {declared.FEW_EXAMPLES[0]} examples")
    for method, color in zip(declared.METHODS, RUN_COLORS, strict=False):
        trials = few(method, declared.FEW_EXAMPLES[0], results)
        done = [results[trial.name] for trial in trials if trial.name in results]
        _draw(last, done, method.title, color)
    for panel in figure.axes:
        panel.set_xlabel("step")
        panel.set_ylabel("validation loss")
        panel.grid(color="#e4e7eb")
        if panel.lines:
            panel.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def _draw(panel: object, runs: Sequence[Result], label: str, color: str) -> None:
    curves = [run.validation for run in runs if not run.diverged]
    if not curves:
        return
    steps = [step for step, _ in curves[0]]
    means = [statistics.fmean(c[i][1] for c in curves) for i in range(len(steps))]
    panel.plot(steps, means, label=f"{label} ({len(curves)} seeds)", color=color)  # type: ignore[attr-defined]


def _possible() -> list[tuple[Method, Variant]]:
    return [(m, v) for m in declared.METHODS for v in declared.VARIANTS if possible(m, v)]


def _losses(method: Method, variant: Variant, results: Mapping[str, Result]) -> list[float]:
    return [r.loss for r in by_seed(method, variant, results)] if possible(method, variant) else []


def _mean(method: Method, variant: Variant, results: Mapping[str, Result]) -> str:
    losses = _losses(method, variant, results)
    return _spread(losses) if losses else NOTHING


def _spread(losses: Sequence[float]) -> str:
    if len(losses) < len(declared.SEEDS):
        return f"{statistics.fmean(losses):.4f} (of {len(losses)} seeds)"
    return f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}"


def _change(method: Method, variant: Variant, results: Mapping[str, Result]) -> str:
    losses, alone = _losses(method, variant, results), _losses(method, declared.NONE, results)
    both = [found - expected for found, expected in zip(losses, alone, strict=False)]
    if not both:
        return NOTHING
    few = "" if len(both) == len(declared.SEEDS) else f" (of {len(both)} seeds)"
    return f"{statistics.fmean(both):+.4f} ({min(both):+.4f} to {max(both):+.4f}){few}"


def _number(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
