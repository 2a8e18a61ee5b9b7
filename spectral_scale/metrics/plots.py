"""Charts as SVG data URIs. matplotlib is used through its objects: no global figure, no display."""

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spectral_scale.metrics.report.run import Array

# Told apart also by readers with impaired colour vision; the first is a single run's.
RUN_COLORS = (
    "#2563eb",
    "#d9480f",
    "#2b8a3e",
    "#9c36b5",
    "#0b7285",
    "#c2255c",
    "#846b00",
    "#495057",
)
INK, FAINT = "#1f2933", "#7b8794"
MAX_POINTS = 1200
MAX_LABEL = 30

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#cbd2d9",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fancybox": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "spectral-scale",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    x: Array
    """Positions, ascending."""
    y: Array
    """Values; what is not finite leaves a gap."""
    color: str
    """Any matplotlib colour."""
    label: str | None = None
    """Text in the legend; None omits the entry."""
    width: float = 1.8
    """Line width in points; 0: points only."""
    alpha: float = 1.0
    """Opacity."""
    style: str = "-"
    """matplotlib line style."""
    marker: str = ""
    """matplotlib marker."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves on one pair of axes."""

    x_label: str
    """Text under the x axis."""
    y_label: str
    """Text beside the y axis."""
    lines: list[Line]
    """Curves, drawn in this order."""
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Positions and colours of vertical marks (resumes)."""
    log_y: bool | None = None
    """Logarithmic y axis; None: when the positive values span more than a factor of five."""
    count_x: bool = True
    """The x axis counts (steps, tokens), so that its ticks are shortened to 2k, 5M."""
    inches: tuple[float, float] = (6.0, 3.5)
    """Width and height."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One stacked horizontal bar with an optional mark."""

    label: str
    """Text beside the bar."""
    parts: dict[str, float]
    """Length of each part, by its name in the legend."""
    mark: float | None
    """Position of a tick across the bar."""


def draw(chart: Chart) -> str:
    """The chart as a `data:image/svg+xml` URI."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with rc_context(_STYLE):
        figure = Figure(figsize=chart.inches, layout="constrained")
        axes = figure.add_subplot()
        for line in chart.lines:
            _draw_line(axes, line)
        _draw_marks(axes, chart.marks)
        if chart.log_y or (chart.log_y is None and _spans(chart.lines, 5.0)):
            _make_log(axes, chart.lines)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        if chart.count_x:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        return _to_uri(figure)


def draw_bars(bars: Sequence[Bar], *, x_label: str, mark_label: str) -> str:
    """Stacked horizontal bars as a `data:image/svg+xml` URI."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(12.0, 1.2 + 0.55 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
        left = np.zeros(len(bars))
        for name, color in zip(names, RUN_COLORS, strict=False):
            lengths = np.array([bar.parts.get(name, 0.0) for bar in bars])
            axes.barh(range(len(bars)), lengths, 0.55, left, label=safe_label(name), color=color)
            left += lengths
        marked = [(row, bar.mark) for row, bar in enumerate(bars) if bar.mark is not None]
        if marked:
            rows, marks = zip(*marked, strict=True)
            axes.plot(marks, rows, "|", color=INK, ms=22, mew=2.5, label=mark_label)
        axes.set_yticks(range(len(bars)), [safe_label(bar.label) for bar in bars])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        axes.set_xlim(left=0)
        figure.legend(loc="outside upper left", ncols=6)
        return _to_uri(figure)


def rolling(
    values: Array, window: int, statistic: Callable[[Array], np.floating] = np.mean
) -> Array:
    """`statistic` of the finite ones of up to `window` points around each, without lag.

    At the start the window shrinks on both sides, so that a steep first descent is kept; at the
    end only on the right, so that the last point is no raw value. What is not finite stays a gap.
    """
    rolled = np.full(len(values), np.nan)
    for at in map(int, np.flatnonzero(np.isfinite(values))):
        half = min(window // 2, at)
        around = values[at - half : at + half + 1]
        rolled[at] = statistic(around[np.isfinite(around)])
    return rolled


def thin(x: Array, y: Array, limit: int = MAX_POINTS) -> tuple[Array, Array]:
    """Keep at most `limit` points: the lowest and highest of each interval, so spikes remain."""
    if len(x) <= limit:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), limit // 2 - 1):
        part = y[stretch]
        if np.isfinite(part).any():
            keep |= {int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])}
        else:
            keep.add(int(stretch[0]))
    chosen = sorted(keep)
    return x[chosen], y[chosen]


def safe_label(text: str) -> str:
    """`text` for a legend: one line, no mathematics, not hidden by a leading underscore, short."""
    line = "".join(char if char.isprintable() else " " for char in text)
    line = line if len(line) <= MAX_LABEL else line[: MAX_LABEL - 3] + "..."
    return (" " if line.startswith("_") else "") + line.replace("$", r"\$")


def _draw_line(axes: Any, line: Line) -> None:
    finite = np.where(np.isfinite(line.y), line.y, np.nan)
    x, y = thin(line.x, finite)
    axes.plot(
        x,
        y,
        color=line.color,
        alpha=line.alpha,
        linewidth=line.width,
        linestyle=line.style if line.width else "",
        marker=line.marker or ("." if len(x) == 1 else ""),
        markersize=5.0,
        markeredgewidth=0.0,
        label=safe_label(line.label) if line.label else None,
    )


def _draw_marks(axes: Any, marks: Sequence[tuple[float, str]]) -> None:
    for index, (x, color) in enumerate(marks):
        label = "resumed" if index == 0 else None
        axes.axvline(x, color=color, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.7, label=label)


def _make_log(axes: Any, lines: Sequence[Line]) -> None:
    """A logarithmic y axis, if any value is positive, with readable ticks."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    positive = _positive(lines)
    if not len(positive):
        return
    axes.set_yscale("log")
    if np.log10(positive.max()) - np.log10(positive.min()) < 4:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(_plain_log)
    else:
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_log(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _spans(lines: Sequence[Line], factor: float) -> bool:
    values = np.concatenate([np.zeros(0), *[line.y[np.isfinite(line.y)] for line in lines]])
    return bool(len(values)) and bool((values > 0).all()) and values.max() > factor * values.min()


def _positive(lines: Sequence[Line]) -> Array:
    values = np.concatenate([np.zeros(0), *[line.y for line in lines]])
    return values[np.isfinite(values) & (values > 0)]


def _to_uri(figure: Any) -> str:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script the font lacks shows boxes, nothing worse
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
