"""The plots of the second study's page. Each shows only what was measured, or is not made."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from study.figures import draw_all, with_legend
from study.results import Result
from study.settings import Variant

from spectral_scale.metrics.plots import RUN_COLORS
from study2 import settings as declared
from study2.axes import Curve, finals, mean_loss, over_seconds, over_tokens, state_bytes
from study2.plan import group
from study2.tables import changed_loss


def draw_figures(results: Mapping[str, Result], folder: Path) -> list[str]:
    """Write every figure that has data; the names of those written."""
    drawn = {
        "tokens.png": _draw_tokens,
        "seconds.png": _draw_seconds,
        "bytes.png": _draw_bytes,
        "rank.png": _draw_rank,
        "tuning.png": _draw_tuning,
    }
    return draw_all(drawn, results, folder)


def _look(variant: Variant, *, label: bool = True) -> dict[str, Any]:
    """A colour a variant, alike at every width."""
    titles = [v.title for v in declared.VARIANTS[declared.WIDTH]]
    place = titles.index(variant.title)
    style = "-" if place < len(RUN_COLORS) else "--"
    color = RUN_COLORS[place % len(RUN_COLORS)]
    return {"color": color, "linestyle": style, "label": variant.title if label else None}


def _draw_tokens(figure: Any, results: Mapping[str, Result]) -> bool:
    axes = _curves(figure, results, over_tokens)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    axes.set(xlabel="tokens", ylabel=f"validation loss, width {declared.WIDTH}")
    return with_legend(figure, axes)


def _draw_seconds(figure: Any, results: Mapping[str, Result]) -> bool:
    axes = _curves(figure, results, over_seconds)
    axes.set(xlabel="processor seconds", ylabel=f"validation loss, width {declared.WIDTH}")
    return with_legend(figure, axes)


def _curves(figure: Any, results: Mapping[str, Result], axis: Callable[[Result], Curve]) -> Any:
    """All seeds, from a fifth of the run on: the start would hide all differences."""
    axes = figure.add_subplot()
    for variant in declared.VARIANTS[declared.WIDTH]:
        for i, run in enumerate(finals(results, variant)):
            points = axis(run)
            points = [p for p in points[len(points) // 5 :] if math.isfinite(p[1])]
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1.2, **_look(variant, label=not i))
    return axes


def _draw_bytes(figure: Any, results: Mapping[str, Result]) -> bool:
    axes = figure.add_subplot()
    for variant in declared.VARIANTS[declared.WIDTH]:
        points = []
        for width in sorted(declared.VARIANTS):
            for own in (v for v in declared.VARIANTS[width] if v.title == variant.title):
                runs, loss = finals(results, own), mean_loss(results, own)
                held = state_bytes(runs[0]) if runs else None
                if held is not None and loss is not None and math.isfinite(loss):
                    points.append((held / 1e6, loss))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", **_look(variant))
    axes.set_xscale("log")
    axes.set(xlabel="training state, MB (widths from left to right)", ylabel="validation loss")
    return with_legend(figure, axes)


def _draw_rank(figure: Any, results: Mapping[str, Result]) -> bool:
    axes = figure.add_subplot()
    own = declared.WIDTH // declared.RANK_FRACTION
    for name in declared.RANKED:
        variant = declared.variant(name, declared.WIDTH)
        losses = {own: mean_loss(results, variant)} | {
            change.settings["spectral.spectral_rank"]: changed_loss(results, change)
            for change in declared.RANK_CHANGES
            if change.of == name
        }
        known = sorted((r / declared.WIDTH, x) for r, x in losses.items() if x is not None)
        if len(known) > 1:
            axes.plot(*zip(*known, strict=True), marker="o", **_look(variant))
    full = mean_loss(results, declared.variant(declared.FULL, declared.WIDTH))
    if full is not None and axes.get_lines():
        axes.axhline(full, color="#1f2933", linewidth=0.8, linestyle=":", label="dense, AdamW")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="r / width", ylabel="validation loss")
    return with_legend(figure, axes)


def _draw_tuning(figure: Any, results: Mapping[str, Result]) -> bool:
    """One panel a width: where the best rates lie, and whether they move."""
    widths = sorted(declared.VARIANTS)
    figure.set_size_inches(11.0, 4.6)
    panels = figure.subplots(1, len(widths), squeeze=False)[0]
    for axes, width in zip(panels, widths, strict=True):
        for variant in declared.VARIANTS[width]:
            losses = sorted(group(width).tuned_rates(results, variant).items())
            points = [(rate, loss) for rate, loss in losses if math.isfinite(loss)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", **_look(variant))
        axes.set_xscale("log")
        axes.set_title(f"width {width}", loc="left", fontsize=9.5)
        axes.set(xlabel="tuned learning rate")
    panels[0].set_ylabel(f"validation loss after {declared.TUNE_STEPS:,} steps")
    fullest = max(panels, key=lambda axes: len(axes.get_lines()))
    return with_legend(figure, fullest, where="outside lower center", columns=4)
