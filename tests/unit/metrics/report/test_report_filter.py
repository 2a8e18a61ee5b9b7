"""The filter's charts: from what a run logs, for one run and for several, and none without."""

import math
from typing import Any

import pytest

from spectral_scale.metrics.report.page import build_report

pytestmark = pytest.mark.usefixtures("quick_charts")
FREQUENCIES = [0.0, 0.5, 1.5, 2.0]


def with_filter(_attempt: int, step: int, values: dict[str, Any]) -> dict[str, Any]:
    """What a filtered run adds to its log."""
    for kind in ("q_proj", "fc1"):
        values[f"filter/removed/{kind}"] = 0.3 + 0.1 * math.exp(-step / 100)
        values[f"filter/rayleigh/{kind}"] = 0.9
        values[f"filter/drift/{kind}"] = step / 1000
        values[f"filter/laplacian/{kind}"] = FREQUENCIES
        values[f"filter/energy/{kind}"] = [0.4, 0.3, 0.2, 0.1]
    return values | {"filter/removed": 0.35, "filter/rayleigh": 0.9, "filter/drift": 0.1}


def test_charts_of_one_run(make_run: Any) -> None:
    html = build_report([make_run("first", steps=60, change=with_filter)]).html
    assert 'id="filter"' in html
    for title in ("Gradient removed", "Mean graph frequency", "Parameter drift"):
        assert title in html
    assert html.count("Gradient energy: ") >= 2


def test_charts_compare_runs_of_which_one_is_filtered(make_run: Any) -> None:
    runs = [make_run("plain", steps=60), make_run("filtered", steps=60, change=with_filter)]
    html = build_report(runs).html
    assert 'id="filter"' in html and "could not be drawn" not in html


def test_no_filter_no_section(make_run: Any) -> None:
    assert 'id="filter"' not in build_report([make_run("first", steps=60)]).html


def test_damaged_lists_are_passed_over(make_run: Any) -> None:
    def damage(attempt: int, step: int, values: dict[str, Any]) -> dict[str, Any]:
        return with_filter(attempt, step, values) | {"filter/energy/fc1": [math.nan, 1.0]}

    html = build_report([make_run("first", steps=60, change=damage)]).html
    assert "Gradient energy: q_proj" in html and "Gradient energy: fc1" not in html
    assert "could not be drawn" not in html
