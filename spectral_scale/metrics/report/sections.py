"""The parts of the report that are charts. Each gives a section, or None where there is no data."""

from collections.abc import Sequence

import numpy as np

from spectral_scale.metrics.plots import Bar, Chart, Line, draw, draw_bars, rolling
from spectral_scale.metrics.report.figures import (
    SMALL,
    Axis,
    common_axis,
    family_figures,
    family_label,
    plain_lines,
    resume_marks,
    run_color,
    run_label,
    run_width,
    series_line,
    smoothed_lines,
)
from spectral_scale.metrics.report.headline import validation_perplexity
from spectral_scale.metrics.report.html import (
    Section,
    byte_unit,
    figure,
    figures,
    number,
    size,
    table,
    text,
)
from spectral_scale.metrics.report.run import RunRecord, Series

MEMORY_PARTS = {
    "weights": "memory/weights_bytes",
    "gradients": "memory/gradients_bytes",
    "optimizer states": "memory/states_bytes",
    "bank": "memory/bank_bytes",
}
SPECTRUM = "spectral/spectrum"
MAX_SPECTRA = 6

Runs = Sequence[RunRecord]


def loss_section(runs: Runs) -> Section | None:
    """Training loss with the validation points, and validation perplexity."""
    axis = common_axis(runs)
    marks = resume_marks(runs, axis)
    items = []
    validation = plain_lines(runs, "validation/loss", axis, label="validation", marker="o")
    points = [_points_only(line, single=len(runs) == 1) for line in validation]
    lines = smoothed_lines(runs, "train/loss", axis) + points
    if lines:
        chart = Chart(x_label=axis.label, y_label="loss (nats a token)", lines=lines, marks=marks)
        caption = "Training loss at each logged step (faint) and smoothed; dots: validation loss."
        items.append(figure("Loss", draw(chart), caption + _resume_caption(marks)))
    perplexity = [
        series_line(index, run, runs, series, axis, label="validation", marker="o")
        for index, run in enumerate(runs)
        if len((series := validation_perplexity(run)).finite())
    ]
    if perplexity:
        chart = Chart(x_label=axis.label, y_label="perplexity", lines=perplexity, marks=marks)
        caption = "Perplexity on the fixed validation sequences."
        items.append(figure("Validation perplexity", draw(chart), caption))
    return _section("loss", "Loss and perplexity", items)


def rates_section(runs: Runs) -> Section | None:
    """Learning rates and gradient norms of each parameter group."""
    axis = common_axis(runs)
    items = family_figures(
        runs,
        "train/lr",
        axis=axis,
        title="Learning rate",
        caption="Each parameter group's rate; the spectral groups ramp up after every swap.",
        total="dense",
        log_y=False,
    ) + family_figures(
        runs,
        "train/grad_norm",
        axis=axis,
        title="Gradient norm",
        caption="Before clipping, each parameter group by itself.",
        total="all groups",
    )
    return _section("rates", "Learning rates and gradients", items)


def speed_section(runs: Runs) -> Section | None:
    """Seconds per step with the swap steps marked, and tokens a second."""
    axis = common_axis(runs)
    items = []
    lines, facts = [], []
    for index, run in enumerate(runs):
        series = run.series("train/step_seconds").finite()
        if not len(series):
            continue
        lines += _step_time_lines(runs, index, series, axis)
        facts.append(_step_time_facts(run, series, named=len(runs) > 1))
    if lines:
        chart = Chart(x_label=axis.label, y_label="seconds", lines=lines)
        caption = (
            "Line: rolling median of a step; diamonds: each swap by itself. "
            + "; ".join(facts)
            + "."
        )
        items.append(figure("Time per step", draw(chart), caption))
    speed = smoothed_lines(runs, "train/tokens_per_second", axis)
    if speed:
        chart = Chart(x_label=axis.label, y_label="tokens a second", lines=speed, log_y=False)
        items.append(figure("Throughput", draw(chart), "Over all ranks; faint: each logged step."))
    mfu = smoothed_lines(runs, "train/mfu", axis)
    if mfu:
        chart = Chart(x_label=axis.label, y_label="fraction of peak", lines=mfu, log_y=False)
        caption = "Model FLOPs utilisation: the model's arithmetic over the devices' peak."
        items.append(figure("MFU", draw(chart), caption))
    return _section("speed", "Speed", items)


def memory_section(runs: Runs) -> Section | None:
    """Largest size of each kind of memory as stacked bars, with the measured peak."""
    sizes = [{name: _largest(run, key) for name, key in MEMORY_PARTS.items()} for run in runs]
    peaks = [_largest(run, "memory/peak_bytes") for run in runs]
    totals = [sum(value or 0.0 for value in parts.values()) for parts in sizes]
    if not any(totals) and not any(peaks):
        return None
    factor, unit = byte_unit(max([*totals, *(peak or 0.0 for peak in peaks)]))
    bars = [
        Bar(
            label=run.name if len(runs) > 1 else "",
            parts={name: (value or 0.0) / factor for name, value in parts.items()},
            mark=None if peak is None else peak / factor,
        )
        for run, parts, peak in zip(runs, sizes, peaks, strict=True)
    ]
    uri = draw_bars(bars, x_label=unit, mark_label="measured peak")
    caption = (
        "On rank 0, the largest value of each kind over the run. What lies between the bar and the "
        "peak is activations, buffers and, on a CPU, everything else in the process."
    )
    body = figures([figure("Memory by kind", uri, caption, wide=True)])
    body += _memory_table(runs, sizes, peaks)
    return Section(anchor="memory", title="Memory", body=body)


def spectral_section(runs: Runs) -> Section | None:
    """Effective rank and orthogonality error over time."""
    axis = common_axis(runs)
    items = family_figures(
        runs,
        "spectral/effective_rank",
        axis=axis,
        title="Effective rank",
        caption="exp of the entropy of the singular values, by kind of layer.",
        total="all layers",
        log_y=False,
    ) + family_figures(
        runs,
        "spectral/orthogonality_error",
        axis=axis,
        title="Orthogonality error",
        caption="max |UᵀU − I| over the directions; it falls back at each re-decomposition.",
        total="worst",
        log_y=True,
    )
    return _section("spectral", "Spectral health", items)


def spectrum_section(runs: Runs) -> Section | None:
    """Quantiles of the singular values, over time for one run, first and last for several."""
    keys = list(dict.fromkeys(key for run in runs for key in run.keys_under(SPECTRUM)))
    items = []
    for key in keys:
        lines = [line for index in range(len(runs)) for line in _spectrum_lines(runs, index, key)]
        if not lines:
            continue
        chart = Chart(
            x_label="fraction of the singular values",
            y_label="σ",
            lines=lines,
            count_x=False,
            inches=SMALL,
        )
        caption = "Largest to the left." + (" Dotted: first, solid: last." if runs[1:] else "")
        title = f"Singular values: {family_label(key, SPECTRUM, 'all layers')}"
        items.append(figure(title, draw(chart), caption))
    return _section("spectra", "Singular spectra", items)


def _memory_table(
    runs: Runs, sizes: Sequence[dict[str, float | None]], peaks: Sequence[float | None]
) -> str:
    rows = [
        [text(run.name), *(size(value) for value in parts.values()), size(peak)]
        for run, parts, peak in zip(runs, sizes, peaks, strict=True)
    ]
    return table(["Run", *MEMORY_PARTS, "measured peak"], rows)


def _section(anchor: str, title: str, items: list[str]) -> Section | None:
    return Section(anchor=anchor, title=title, body=figures(items)) if items else None


def _points_only(line: Line, *, single: bool) -> Line:
    color = "#d9480f" if single else line.color
    label = line.label if single else None
    return Line(x=line.x, y=line.y, color=color, label=label, width=0, marker="o")


def _resume_caption(marks: list[tuple[float, str]]) -> str:
    return " Dashed: the run was resumed here." if marks else ""


def _step_time_lines(runs: Runs, index: int, series: Series, axis: Axis) -> list[Line]:
    run, color = runs[index], run_color(index)
    x = axis.positions(run, series.steps)
    median = rolling(series.values, max(3, len(series) // 40), np.median)
    swaps = _swaps(run)
    lines = [
        Line(x=x, y=series.values, color=color, width=0, marker=".", alpha=0.3),
        Line(
            x=x,
            y=median,
            color=color,
            width=run_width(index, runs),
            label=run_label(run, runs, "median"),
        ),
    ]
    if len(swaps):
        label = "one swap" if len(runs) == 1 else None
        mark = color if len(runs) > 1 else "#d9480f"
        lines.append(
            Line(
                x=axis.positions(run, swaps.steps),
                y=swaps.values,
                color=mark,
                width=0,
                marker="D",
                label=label,
            )
        )
    return lines


def _step_time_facts(run: RunRecord, series: Series, *, named: bool) -> str:
    fact = f"{run.name}: median" if named else "Median"
    fact += f" {number(float(np.median(series.values)), 3)} s a step"
    swaps = _swaps(run).values
    if len(swaps):
        # A logged value is the mean over the steps since the one before.
        total = float((series.values * np.diff(series.steps, prepend=0.0)).sum())
        fact += f", {number(float(np.median(swaps)), 3)} s each of {len(swaps)} swaps"
        fact += f", {swaps.sum() / total:.1%} of the time" if total > 0 else ""
    return fact


def _swaps(run: RunRecord) -> Series:
    """Seconds of each swap of triplets."""
    series = run.series("spectral/boundary_seconds").finite()
    return Series(steps=series.steps[series.values > 0], values=series.values[series.values > 0])


def _largest(run: RunRecord, key: str) -> float | None:
    values = run.series(key).finite().values
    return float(values.max()) if len(values) else None


def _spectrum_lines(runs: Runs, index: int, key: str) -> list[Line]:
    """A run's spectra: some over time (one run), the first and the last (several)."""
    spectra = [(line["step"], _spectrum(line.get(key))) for line in runs[index].lines]
    logged = [(step, values) for step, values in spectra if values is not None]
    if not logged:
        return []
    wanted = MAX_SPECTRA if len(runs) == 1 else 2
    picks = np.unique(np.linspace(0, len(logged) - 1, wanted).round().astype(int))
    lines = []
    for place, pick in enumerate(picks):
        step, values = logged[pick]
        last = pick == picks[-1]
        single = len(runs) == 1
        lines.append(
            Line(
                x=np.linspace(0.0, 1.0, len(values)),
                y=values,
                color=_time_color(place / max(len(picks) - 1, 1)) if single else run_color(index),
                label=f"step {step:,}" if single else runs[index].name if last else None,
                style="-" if single or last else ":",
                width=1.6,
            )
        )
    return lines


def _spectrum(values: object) -> np.ndarray | None:
    """Singular values, largest first; None unless a list of numbers with a finite one."""
    if not isinstance(values, list) or not all(isinstance(x, (int, float)) for x in values):
        return None
    array = np.sort(np.array(values, dtype=np.float64))[::-1]
    return array if np.isfinite(array).any() else None


def _time_color(fraction: float) -> str:
    """Colour of a point in time, from pale to dark blue."""
    pale, dark = (166, 200, 255), (15, 40, 110)
    mixed = (round(a + (b - a) * fraction) for a, b in zip(pale, dark, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
