"""Draws runs as charts: one colour per run in comparisons, otherwise one per curve."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spectral_scale.metrics.plots import RUN_COLORS, Chart, Line, draw, rolling
from spectral_scale.metrics.report.html import figure
from spectral_scale.metrics.report.run import Array, RunRecord, Series

GROUP_LABELS = {
    "dense": "dense",
    "spectral_direction": "directions",
    "spectral_value": "singular values",
}
SMALL = (5.0, 3.1)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The common horizontal axis of several runs."""

    label: str
    """Label of the axis."""
    in_tokens: bool
    """Training tokens instead of optimizer steps."""

    def positions(self, run: RunRecord, steps: Array) -> Array:
        """Positions of the run's `steps` on the axis."""
        if not self.in_tokens:
            return steps
        tokens = run.series("train/tokens").finite()
        return np.interp(steps, np.append(0.0, tokens.steps), np.append(0.0, tokens.values))


def common_axis(runs: Sequence[RunRecord]) -> Axis:
    """Optimizer steps; tokens where the runs' steps are not equally large."""
    last = [run.series("train/tokens").finite() for run in runs]
    if len(runs) > 1 and all(len(tokens) for tokens in last):
        per_step = [tokens.values[-1] / max(tokens.steps[-1], 1.0) for tokens in last]
        if max(per_step) > 1.01 * min(per_step):
            return Axis(label="training tokens", in_tokens=True)
    return Axis(label="optimizer step", in_tokens=False)


def run_color(index: int) -> str:
    """The colour of the run at `index` in the report."""
    return RUN_COLORS[index % len(RUN_COLORS)]


def run_width(index: int, runs: Sequence[RunRecord]) -> float:
    """Line width of a run: earlier runs are wider, so that equal curves show all their colours."""
    return 1.8 if len(runs) == 1 else 1.5 + 3.5 * (len(runs) - 1 - index) / (len(runs) - 1)


def run_label(run: RunRecord, runs: Sequence[RunRecord], alone: str) -> str:
    """Text of a legend: the run's name, or what the curve is when there is one run."""
    return run.name if len(runs) > 1 else alone


def resume_marks(runs: Sequence[RunRecord], axis: Axis) -> list[tuple[float, str]]:
    """A mark for every resume, in the run's colour when there are several."""
    marks = []
    for index, run in enumerate(runs):
        steps = np.array(run.history.resume_steps(), dtype=np.float64)
        color = run_color(index) if len(runs) > 1 else "#52606d"
        marks += [(float(x), color) for x in axis.positions(run, steps)]
    return marks


def smoothed_lines(runs: Sequence[RunRecord], key: str, axis: Axis) -> list[Line]:
    """The raw values of `key`, faint, under their mean over a fortieth of the run."""
    raw, means = [], []
    for index, run in enumerate(runs):
        series = run.series(key)
        if not len(series.finite()):
            continue
        x, color = axis.positions(run, series.steps), run_color(index)
        mean = rolling(series.values, max(1, len(series) // 40))
        raw.append(Line(x=x, y=series.values, color=color, alpha=0.28, width=0.9))
        label = run_label(run, runs, "smoothed")
        means.append(Line(x=x, y=mean, color=color, label=label, width=run_width(index, runs)))
    return raw + means


def plain_lines(
    runs: Sequence[RunRecord], key: str, axis: Axis, *, label: str, marker: str = ""
) -> list[Line]:
    """One curve of `key` a run."""
    series = [(index, run, run.series(key)) for index, run in enumerate(runs)]
    return [
        series_line(index, run, runs, values, axis, label=label, marker=marker)
        for index, run, values in series
        if len(values.finite())
    ]


def series_line(
    index: int,
    run: RunRecord,
    runs: Sequence[RunRecord],
    series: Series,
    axis: Axis,
    *,
    label: str,
    marker: str = "",
) -> Line:
    """One curve in the colour of the run at `index`."""
    return Line(
        x=axis.positions(run, series.steps),
        y=series.values,
        color=run_color(index),
        label=run_label(run, runs, label),
        width=run_width(index, runs),
        marker=marker,
    )


def family_figures(
    runs: Sequence[RunRecord],
    prefix: str,
    *,
    axis: Axis,
    title: str,
    caption: str,
    total: str = "all",
    log_y: bool | None = None,
) -> list[str]:
    """Charts of `prefix` and the keys under it.

    One run: all its curves in one chart. Several: a chart a key, a colour a run. Without any
    finite value: no chart.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.keys_under(prefix)))
    keys = [key for key in keys if any(len(run.series(key).finite()) for run in runs)]
    keys.sort(key=lambda key: key != prefix)  # the total first, the others as they appeared
    if all(_is_repeated(run, prefix, keys) for run in runs):
        keys.remove(prefix)
    named = {key: family_label(key, prefix, total) for key in keys}
    if not keys:
        return []
    if len(runs) == 1:
        lines = [
            Line(
                x=runs[0].series(key).steps,
                y=runs[0].series(key).values,
                color=run_color(number),
                label=named[key] if len(keys) > 1 else None,
                width=1.4 + 1.8 * (len(keys) - 1 - number) / len(keys),
            )
            for number, key in enumerate(keys)
        ]
        chart = Chart(x_label=axis.label, y_label=title.lower(), lines=lines, log_y=log_y)
        return [figure(title, draw(chart), caption)]
    charts = []
    for key in keys:
        lines = plain_lines(runs, key, axis, label=named[key])
        chart = Chart(
            x_label=axis.label, y_label=title.lower(), lines=lines, log_y=log_y, inches=SMALL
        )
        charts.append(figure(f"{title}: {named[key]}", draw(chart), caption))
    return charts


def _is_repeated(run: RunRecord, prefix: str, keys: Sequence[str]) -> bool:
    """True if the values logged under `prefix` itself are also logged under another key."""
    if prefix not in keys:
        return False
    own = run.series(prefix)
    others = (run.series(key) for key in keys if key != prefix)
    return any(
        np.array_equal(own.steps, other.steps) and np.array_equal(own.values, other.values)
        for other in others
    )


def family_label(key: str, prefix: str, total: str) -> str:
    """The part of `key` under `prefix` as a readable label."""
    tail = key.removeprefix(prefix).strip("/")
    return GROUP_LABELS.get(tail, tail) or total
