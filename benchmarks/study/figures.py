"""The plots of the page, as PNG files. Each shows only what was measured, or is not made."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from spectral_scale.metrics.plots import RUN_COLORS
from study import settings as declared
from study.dip import boundaries, trained_norms
from study.plan import tuned_rates, tuned_variants
from study.results import Result
from study.settings import TOKENS_PER_STEP, Variant
from study.tables import final

DPI = 120
EPSILON, LARGE = 1e-8, 1e-4
"""Adam's, of all runs that do not name another, and of final runs that do."""
STYLE: Any = {
    "font.size": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e7eb",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
}


Draw = Callable[[Any, Mapping[str, Result]], bool]
"""Draws into a figure; whether there was anything to draw."""


def draw_figures(results: Mapping[str, Result], folder: Path) -> list[str]:
    """Write every figure of this study that has data; the names of those written."""
    drawn = {
        "tuning.png": _draw_tuning,
        "curves.png": _draw_curves,
        "ablations.png": _draw_ablations,
        "epsilon.png": _draw_epsilon,
        "gradient_norm.png": _draw_dip,
    }
    return draw_all(drawn, results, folder)


def draw_all(drawn: Mapping[str, Draw], results: Mapping[str, Result], folder: Path) -> list[str]:
    """Write every figure that has data, and remove those that have none any more."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in drawn.items():
        with rc_context(STYLE):
            figure = Figure(figsize=(8.0, 4.4), layout="constrained", dpi=DPI)
            if draw(figure, results):
                figure.savefig(folder / name, metadata={"Software": None})
                written.append(name)
            else:
                (folder / name).unlink(missing_ok=True)
    return written


def _look(variant: Variant) -> dict[str, Any]:
    """A colour a method, dashes for the smaller rank."""
    methods = list(dict.fromkeys(_method(v) for v in declared.VARIANTS))
    color = RUN_COLORS[methods.index(_method(variant)) % len(RUN_COLORS)]
    small = variant.rank == declared.SMALL_RANK
    return {"color": color, "linestyle": "--" if small else "-", "label": variant.title}


def _method(variant: Variant) -> str:
    return variant.title.removesuffix(f", r = {variant.rank}")


def _draw_tuning(figure: Any, results: Mapping[str, Result]) -> bool:
    axes = figure.add_subplot()
    for variant in tuned_variants():
        losses = sorted(tuned_rates(results, variant).items())
        points = [(rate, loss) for rate, loss in losses if math.isfinite(loss)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", **_look(variant))
    axes.set_xscale("log")
    rates = [declared.FULL.first_rate * 2.0**power for power in range(-5, 6)]
    axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
    axes.minorticks_off()
    tried = [x for line in axes.get_lines() for x in line.get_xdata()]
    if tried:
        axes.set_xlim(min(tried) / 1.2, max(tried) * 1.2)
    tokens = declared.TUNE_STEPS * TOKENS_PER_STEP / 1e6
    axes.set(xlabel="tuned learning rate", ylabel=f"validation loss after {tokens:.2f} M tokens")
    return with_legend(figure, axes)


def _draw_curves(figure: Any, results: Mapping[str, Result]) -> bool:
    """Left the losses, right what is lost against full rank of the same seed at equal tokens."""
    figure.set_size_inches(9.5, 5.2)
    left, right = figure.subplots(1, 2)
    for variant in tuned_variants():
        look = _look(variant)
        for seed in declared.SEEDS:
            run, full = (final(results, v, seed) for v in (variant, declared.FULL))
            if run is None:
                continue
            style = look | {"linewidth": 1.4, "alpha": 1.0 - 0.4 * seed}
            left.plot(*_points(run), **style)
            look["label"] = None
            if full is not None and full is not run:
                lost = dict(full.validation)
                steps, losses = _points(run, minus=lost)
                right.plot(steps, losses, **style | {"label": None})
    for axes, label in ((left, "validation loss"), (right, "validation loss - full rank's")):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
        axes.set(xlabel="tokens", ylabel=label)
    return with_legend(figure, left, where="outside lower center", columns=3)


def _points(
    run: Result, *, minus: Mapping[int, float] | None = None
) -> tuple[list[int], list[float]]:
    """Tokens and losses from an eighth of the run on: the start would hide all differences."""
    late = [(s, loss) for s, loss in run.validation if s >= declared.FINAL_STEPS // 8]
    if minus is not None:
        late = [(step, loss - minus[step]) for step, loss in late if step in minus]
    return [step * TOKENS_PER_STEP for step, _ in late], [loss for _, loss in late]


def _draw_ablations(figure: Any, results: Mapping[str, Result]) -> bool:
    base = results.get(declared.BASE.run(declared.SEEDS[0]))
    runs = [
        (a.title, results.get(a.run(declared.SEEDS[0])))
        for a in declared.ABLATIONS[1:]
        if a.of is declared.SST
    ]
    found = [(title, run) for title, run in runs if run is not None and not run.diverged]
    if base is None or base.diverged or not found:
        return False
    axes = figure.add_subplot()
    differences = [run.loss - base.loss for _, run in found]
    axes.barh(range(len(found)), differences, color=RUN_COLORS[0])
    axes.set_yticks(range(len(found)), [title.replace("`", "") for title, _ in found])
    axes.invert_yaxis()
    axes.axvline(0.0, color="#1f2933", linewidth=0.8)
    axes.set_xlabel("validation loss minus that of the unchanged run (left is better)")
    return True


def _draw_epsilon(figure: Any, results: Mapping[str, Result]) -> bool:
    """Left the ablations, right the final runs that have another epsilon than the others."""
    figure.set_size_inches(9.5, 4.4)
    left, right = figure.subplots(1, 2)
    seed = declared.SEEDS[0]
    for variant in (declared.FULL, declared.SST, declared.LORA):
        runs = {
            float((declared.COMMON | a.settings)["optimizer.eps"]): results.get(a.run(seed))
            for a in declared.ABLATIONS
            if a.of is variant and {*a.settings} <= {"optimizer.eps"} and a.rate_factor == 1.0
        }
        points = sorted((eps, r.loss) for eps, r in runs.items() if r and eps >= EPSILON)
        if len(points) > 1:
            left.plot(*zip(*points, strict=True), marker="o", **_look(variant))
        for other in declared.VARIANTS:
            if (other.tuned_as or other.name) != variant.name:
                continue
            dashes = "-" if other.epsilon == EPSILON else "--"
            for at in declared.SEEDS:
                if other.epsilon in (EPSILON, LARGE) and (run := final(results, other, at)):
                    look = _look(variant) | {"label": None, "linestyle": dashes}
                    right.plot(*_points(run), **look)
    left.set_xscale("log")
    tokens = declared.ABLATION_STEPS * TOKENS_PER_STEP / 1e6
    left.set(xlabel="Adam's epsilon", ylabel=f"validation loss after {tokens:.2f} M tokens")
    right.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    right.set(xlabel="tokens (dashed: epsilon 1e-4)", ylabel="validation loss")
    return with_legend(figure, left, where="outside lower center", columns=3)


def _draw_dip(figure: Any, results: Mapping[str, Result]) -> bool:
    runs = [(v, results.get(f"dip-{v.name}")) for v in declared.DIP_VARIANTS]
    found = [(variant, run) for variant, run in runs if run is not None and boundaries(run)]
    if not found:
        return False
    rows = figure.subplots(len(found), 1, sharex=True, sharey=True, squeeze=False)
    for axes, (variant, run) in zip(rows[:, 0], found, strict=True):
        norms = trained_norms(run)
        axes.plot(range(1, len(norms) + 1), norms, linewidth=1.1, color=_look(variant)["color"])
        for step in boundaries(run):
            axes.axvline(step + 0.5, color="#7b8794", linewidth=0.8, linestyle=":")
        axes.set_title(variant.title, loc="left", fontsize=9.5)
        axes.set_ylabel("gradient norm")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("optimizer step (dotted: merge or swap)")
    return True


def with_legend(
    figure: Any, axes: Any, *, where: str = "outside right upper", columns: int = 1
) -> bool:
    """Put a legend beside the axes; whether there was anything to put into it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc=where, ncols=columns)
    return bool(handles)
