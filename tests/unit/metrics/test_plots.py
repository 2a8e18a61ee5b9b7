"""Charts: no spike is thinned away, smoothing does not lag, labels are harmless."""

import base64
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from spectral_scale.metrics.plots import (
    Bar,
    Chart,
    Line,
    draw,
    draw_bars,
    rolling,
    safe_label,
    thin,
)


def svg(uri: str) -> ElementTree.Element:
    head, data = uri.split(",", 1)
    assert head == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(data))


def chart(y, **settings) -> Chart:
    y = np.asarray(y, dtype=float)
    line = Line(x=np.arange(len(y), dtype=float), y=y, color="#2563eb", label="loss")
    return Chart(x_label="step", y_label="loss", lines=[line], **settings)


def test_thinning_keeps_ends_spikes_and_order():
    x = np.arange(50_000.0)
    y = np.sin(x / 5000)
    y[12_345], y[40_001] = 99.0, -99.0
    thin_x, thin_y = thin(x, y, 1000)
    assert len(thin_x) <= 1000 and (np.diff(thin_x) > 0).all()
    assert {99.0, -99.0} <= set(thin_y)
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert np.array_equal(thin_y, y[thin_x.astype(int)])


def test_thinning_keeps_gaps():
    y = np.full(10_000, np.nan)
    y[:10] = 1.0
    thin_x, thin_y = thin(np.arange(10_000.0), y, 100)
    assert len(thin_x) <= 100 and np.isnan(thin_y).any() and np.isfinite(thin_y).any()


def test_rolling_mean_does_not_lag_and_keeps_gaps():
    line = np.linspace(9.0, 3.0, 101)
    assert rolling(line, 20)[:-10] == pytest.approx(line[:-10])
    noise = np.tile([0.0, 1.0], 50)
    assert rolling(noise, 20)[-1] == pytest.approx(0.5, abs=0.06)  # no raw value at the end
    gapped = line.copy()
    gapped[50] = np.nan
    rolled = rolling(gapped, 20)
    assert np.isnan(rolled[50]) and np.isfinite(np.delete(rolled, 50)).all()
    huge = np.where(np.arange(101) == 10, 1e300, line)
    assert rolling(huge, 20)[40:-10] == pytest.approx(line[40:-10])
    assert rolling(np.array([1.0, 9.0, 2.0]), 3, np.median)[1] == 2.0
    assert len(rolling(np.zeros(0), 5)) == 0


@pytest.mark.parametrize(
    "y",
    [
        [1.0, 2.0, 3.0],
        [1.0],
        [np.nan, 1.0, np.inf, -np.inf, 2.0],
        [1.0, 1e3, 1e9],
        [0.0, 0.0],
        [-1.0, 1000.0],
        [1e-300, 1e300],
        [5e-324, 1.0],
    ],
)
@pytest.mark.parametrize("log_y", [True, None])
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.slow
def test_any_values_can_be_drawn(y, log_y):
    assert svg(draw(chart(y, log_y=log_y, marks=[(1.0, "#000000")]))).tag.endswith("svg")


@pytest.mark.slow
def test_equal_input_gives_equal_bytes():
    assert draw(chart([1.0, 2.0])) == draw(chart([1.0, 2.0]))
    assert draw(chart([1.0, 2.0])) != draw(chart([1.0, 2.5]))


def test_bars_with_missing_parts_and_marks():
    bars = [Bar(label="a", parts={"weights": 1.0}, mark=3.0), Bar(label="", parts={}, mark=None)]
    assert svg(draw_bars(bars, x_label="GiB", mark_label="peak")).tag.endswith("svg")


def test_labels_cannot_hide_or_break_the_legend():
    assert safe_label("_hidden") == " _hidden"
    assert safe_label("$\\frac{") == r"\$\frac{"
    assert safe_label("a\nb\x00") == "a b "
    assert len(safe_label("x" * 500)) == 30
