"""A picture of plans: bars of memory by part, of traffic and, where it is estimated, of time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from spectral_scale.errors import ConfigError
from spectral_scale.plan.build import Plan

PARTS = {
    "weights": ("weights", "#1d4ed8"),
    "gradients": ("gradients", "#d9480f"),
    "optimizer": ("moments, masters", "#f59f00"),
    "bank": ("triplets owned", "#2b8a3e"),
}
"""Part of a plan's memory -> title and colour; what is held only within a step is left out."""
INK, FAINT = "#1f2933", "#7b8794"
GB = 1e9


def draw(
    plans: Mapping[str, Plan],
    output: Path,
    *,
    group: int = 1,
    seconds: Sequence[float] | None = None,
) -> None:
    """Draw panels of horizontal bars as SVG. Raises ConfigError if the file cannot be written.

    Args:
        plans: by label, in the order in which they are drawn.
        output: the file.
        group: neighbouring bars that belong together.
        seconds: of a step of each plan, for a third panel.
    """
    widths = (3, 2) if seconds is None else (3, 2, 2)
    height = 0.9 + 0.325 * len(plans)
    figure = Figure(figsize=(9.6, height), layout="constrained")
    panels = figure.subplots(1, len(widths), width_ratios=widths, sharey=True)
    rows = [row + 0.35 * (row // group) for row in range(len(plans))]
    _draw_memory(panels[0], rows, plans)
    traffic = [traffic_a_step(plan) / GB for plan in plans.values()]
    _draw_bars(panels[1], rows, traffic, "sent by a rank a step, GB", "#0b7285")
    if seconds is not None:
        _draw_bars(panels[2], rows, seconds, "a step, s (estimated)", "#5f3dc4")
    panels[0].set_yticks(rows, list(plans))
    panels[0].invert_yaxis()
    for axes in panels:
        axes.tick_params(colors=INK, length=0, labelsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#cbd2d9")
        axes.grid(axis="x", color="#e4e7eb")
        axes.set_axisbelow(True)
    try:
        FigureCanvasSVG(figure).print_svg(output, metadata={"Date": None})
    except OSError as error:
        raise ConfigError(
            f"the picture {output} cannot be written ({error.strerror}); give a file in a folder "
            "that exists and is yours"
        ) from None


def held(plan: Plan) -> float:
    """Bytes that a rank holds between steps."""
    return sum(plan.memory[part] for part in PARTS)


def traffic_a_step(plan: Plan) -> float:
    """Bytes that a rank sends in a step, those of swaps spread over the steps between."""
    every = plan.boundary_every_steps
    return plan.step_traffic_bytes + (plan.boundary_traffic_bytes / every if every else 0.0)


def _draw_memory(axes: Axes, rows: list[float], plans: Mapping[str, Plan]) -> None:
    left = [0.0] * len(plans)
    for part, (title, color) in PARTS.items():
        widths = [plan.memory[part] / GB for plan in plans.values()]
        axes.barh(rows, widths, left=left, color=color, label=title, height=0.8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _write_values(axes, rows, left)
    axes.set_title("held by a rank between steps, GB", fontsize=9.5, color=INK, loc="left")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")


def _draw_bars(
    axes: Axes, rows: list[float], values: Sequence[float], title: str, color: str
) -> None:
    axes.barh(rows, values, color=color, height=0.8)
    _write_values(axes, rows, values)
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")


def _write_values(axes: Axes, rows: list[float], values: Sequence[float]) -> None:
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            f"{value:.1f}", (value, row), (4, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    axes.set_xlim(0, max(*values, 1e-9) * 1.12)
