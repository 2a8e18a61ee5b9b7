"""The report's charts of the spectral filter: is there anything to filter, and what did it do?"""

from collections.abc import Sequence

import numpy as np

from spectral_scale.metrics.plots import Chart, Line, draw
from spectral_scale.metrics.report.figures import (
    SMALL,
    common_axis,
    family_figures,
    family_label,
    run_color,
)
from spectral_scale.metrics.report.html import Section, figure, figures
from spectral_scale.metrics.report.run import Array, RunRecord

ENERGY, LAPLACIAN = "filter/energy", "filter/laplacian"
Runs = Sequence[RunRecord]


def filter_section(runs: Runs) -> Section | None:
    """Energy of gradients by graph frequency, what was removed of it, and parameters' drift."""
    axis = common_axis(runs)
    items = family_figures(
        runs,
        "filter/removed",
        axis=axis,
        title="Gradient removed",
        caption="Share of the squared gradient that the filter takes away.",
        total="all",
        log_y=False,
    ) + family_figures(
        runs,
        "filter/rayleigh",
        axis=axis,
        title="Mean graph frequency",
        caption=(
            "Of the gradient before filtering. As large as the mean of the frequencies: nothing "
            "is smooth on this graph, and a low-pass filter only shrinks the step."
        ),
        total="all",
        log_y=False,
    )
    items += _energy_figures(runs)
    items += family_figures(
        runs,
        "filter/drift",
        axis=axis,
        title="Parameter drift",
        caption="|theta - theta0| / |theta0| from sampled entries, of the filtered parameters.",
        total="all",
        log_y=False,
    )
    if not items:
        return None
    return Section(anchor="filter", title="Spectral filter", body=figures(items))


def _energy_figures(runs: Runs) -> list[str]:
    """Last logged share of the gradient at each frequency, and what a white one would have."""
    keys = list(dict.fromkeys(key for run in runs for key in run.keys_under(ENERGY)))
    items = []
    for key in keys:
        kind = key.removeprefix(f"{ENERGY}/")
        lines = []
        for index, run in enumerate(runs):
            energy, frequency = _last(run, key), _last(run, f"{LAPLACIAN}/{kind}")
            if energy is None or frequency is None or len(energy) != len(frequency):
                continue
            color = run_color(index)
            label = run.name if len(runs) > 1 else "gradient"
            lines.append(Line(x=frequency, y=energy, color=color, label=label, marker="o"))
            if index == 0:
                white = np.full(len(energy), 1.0 / len(energy))
                faint = Line(x=frequency, y=white, color="#7b8794", label="white", style=":")
                lines.append(faint)
        if lines:
            chart = Chart(
                x_label="graph frequency",
                y_label="share of |G|²",
                lines=lines,
                log_y=False,
                count_x=False,
                inches=SMALL,
            )
            title = f"Gradient energy: {family_label(key, ENERGY, 'all')}"
            caption = "At the last logged step. Left of the crossing: more than a white gradient."
            items.append(figure(title, draw(chart), caption))
    return items


def _last(run: RunRecord, key: str) -> Array | None:
    """The latest list of finite numbers under `key`."""
    for line in reversed(run.lines):
        values = line.get(key)
        if isinstance(values, list) and all(isinstance(x, (int, float)) for x in values):
            array = np.array(values, dtype=np.float64)
            return array if len(array) and bool(np.isfinite(array).all()) else None
    return None
