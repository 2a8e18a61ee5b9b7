"""The benchmark's arithmetic: formula, spread, load."""

import pytest

from spectral_scale.bench import machine
from spectral_scale.bench.machine import LoadWatch, load_warning
from spectral_scale.bench.memory import state_formula
from spectral_scale.bench.results import Spread

MATRICES = [(6, 4), (3, 5)]


def formula(variant: str, frozen_bytes: int = 4) -> dict[str, int]:
    return state_formula(
        variant, MATRICES, other_elements=10, spectral_rank=2, frozen_bytes=frozen_bytes
    )  # type: ignore[arg-type]


def test_formula_by_hand() -> None:
    """(6, 4): k = 4, r (m + n) = 20; (3, 5): k = 3, r (m + n) = 16; 10 other elements."""
    bank = 4 * (4 * 10 + 4 + 3 * 8 + 3)
    dense = 24 + 15 + 10
    residual = 20 + 2 + 16 + 2 + 10
    factored = 20 + 4 + 16 + 3 + 10
    assert formula("dense") == {
        "weights": 4 * dense, "gradients": 4 * dense, "moments": 8 * dense, "bank": 0
    }  # fmt: skip
    assert formula("sst residual", 2) == {
        "weights": 4 * residual + 2 * 39,
        "gradients": 4 * residual,
        "moments": 8 * residual,
        "bank": bank,
    }
    assert formula("sst int8", 2) == formula("sst residual", 2) | {
        "weights": 4 * residual + 39 + 4 * (6 + 3)
    }
    assert formula("sst factored") == {
        "weights": 4 * (factored + 2 * 10 + 1 * 8),
        "gradients": 4 * factored,
        "moments": 8 * factored,
        "bank": bank,
    }
    tangent = 20 + 16 + 10
    assert formula("tangent", 2) == {
        "weights": 4 * tangent + 2 * (39 + 36),
        "gradients": 4 * tangent,
        "moments": 8 * tangent,
        "bank": 4 * 39,
    }


def test_spread() -> None:
    assert Spread.of([2.0]) == Spread(median=2.0, lower_quartile=2.0, upper_quartile=2.0)
    found = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == Spread(median=3.0, lower_quartile=2.0, upper_quartile=4.0)


@pytest.mark.parametrize(
    ("average", "others", "threads", "warned"),
    [(0.1, 0.4, 1, False), (0.6, 0.0, 1, True), (0.0, 0.6, 1, True), (0.9, 0.9, 2, False)],
)
def test_load_besides_our_own_is_told(
    average: float, others: float, threads: int, warned: bool
) -> None:
    text = load_warning(average_at_start=average, others=others, threads=threads)
    assert (text is not None) == warned
    if text is not None:
        assert f"{average:.2f}" in text and "repeat on an idle machine" in text


def test_load_watch_leaves_our_own_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s of wall, 18 s busy in all, 8 of them ours: one processor was busy with others."""
    wall, busy, own = iter([0.0, 10.0]), iter([100.0, 118.0]), iter([1.0, 9.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    assert LoadWatch().others() == pytest.approx(1.0)


def test_cpu_model_is_read(tmp_path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n", encoding="utf-8")
    assert machine._cpu_model(file) == "Some CPU @ 3 GHz"
    assert machine._cpu_model(tmp_path / "absent")
