"""The tables of equivalence hold the rows that their pages speak of."""

import equivalence
import equivalence_methods
import equivalence_rounding
import numpy as np
import pytest

DOUBLE = ("DDP in fp64", "FSDP2 in fp64")


@pytest.mark.parametrize("name", DOUBLE)
def test_fp64_rows_are_compared_with_fp64_in_one_process_and_held_to_its_bound(name) -> None:
    rows = list(equivalence.rows(name))
    assert {row.processes for row in rows} == {1, 2, 3, 4}
    assert {row.precision for row in rows} == {"fp64"}
    assert all(row.alone[-1] == "fp64" for row in rows)
    assert equivalence.LARGEST["fp64"] == 1e-12


def test_methods_are_compared_in_fp32_alone() -> None:
    assert not [name for name in equivalence_methods.PLAIN if "fp" in name or "bf" in name]
    assert {"DDP", "FSDP2", "ZeRO-3"} <= set(equivalence_methods.PLAIN)


def test_the_curve_holds_the_largest_difference_so_far(monkeypatch) -> None:
    """Two runs of four steps; the second difference is the largest, and stays."""
    losses = {1: [[5.0, 4.0, 3.0, 2.0]], 2: [[5.0, 4.5, 3.25, 2.0]]}
    monkeypatch.setattr(equivalence_rounding, "_losses", lambda corpus, world, runs: losses[world])
    monkeypatch.setattr(equivalence_rounding, "small_corpus", lambda folder: folder)
    curves = equivalence_rounding.CURVES[:1]

    found = equivalence_rounding.measure(curves, 4)
    assert np.allclose(found, [[0.0, 0.5, 0.5, 0.5]])
    assert equivalence_rounding.picture(curves, found).startswith(b"<?xml")


def test_the_curves_show_width_precision_backends_and_dense_training() -> None:
    curves = equivalence_rounding.CURVES
    assert {c.width for c in curves} == {64, 256}
    assert {c.backend for c in curves} == {"DDP", "FSDP2"}
    assert {c.method for c in curves} == {"full", "sst"}
    exact = [c for c in curves if c.precision == "fp64"]
    assert [c.alone["train__precision"] for c in exact] == ["fp64"]
    assert len({c.label for c in curves}) == len(curves)
