"""Checkpoints written beside training: the same bytes, one at a time, and no fault lost."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.names import list_checkpoints
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.errors import CheckpointError
from spectral_scale.supervision.control_files import ask
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny

SMALL: dict[str, Any] = {
    "model__num_layers": 1,
    "train__steps": 9,
    "train__micro_batch_size": 3,
    "train__eval_interval": 100,
    "checkpoint__interval": 2,
    "checkpoint__keep_last": 9,
}


def contents(run_dir: Path) -> dict[int, dict[str, np.ndarray]]:
    readers = [CheckpointReader.open(path) for path in list_checkpoints(run_dir / "checkpoints")]
    return {r.step: {name: r.read(name).numpy() for name in r.tensors} for r in readers}


def same(left: dict[int, Any], right: dict[int, Any]) -> None:
    assert left.keys() == right.keys()
    for step in left:
        for name, value in left[step].items():
            assert np.array_equal(value, right[step][name]), (step, name)


def slow_saves(seconds: float) -> None:
    """From now on, a save begins to write that much later: training goes on in between."""
    original = CheckpointManager.save

    def save(self: Any, *arguments: Any, **options: Any) -> Path:
        time.sleep(seconds)
        return original(self, *arguments, **options)

    CheckpointManager.save = save  # type: ignore[method-assign]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointManager, "save", CheckpointManager.save)
    slow_saves(0.7)


def test_a_snapshot_is_of_one_step_however_late_it_is_written(
    corpus: Path, tmp_path: Path, slow: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Saves take longer than their interval: training waits for each, and none is dropped."""
    train_tiny(tiny_config(corpus, tmp_path / "a", **SMALL, checkpoint__async_save=True))
    waits = [r for r in caplog.records if "which was being written" in r.getMessage()]
    assert waits and threading.active_count() < 20
    train_tiny(tiny_config(corpus, tmp_path / "b", **SMALL))
    found = contents(tmp_path / "a")
    assert sorted(found) == [2, 4, 6, 8, 9]
    same(found, contents(tmp_path / "b"))


def test_the_comparison_sees_a_snapshot_that_is_none(
    corpus: Path, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written without a copy, a late save holds a later step's numbers."""
    from spectral_scale.engine.host_copies import HostCopies

    monkeypatch.setattr(HostCopies, "take", lambda _, chunks: list(chunks))
    train_tiny(tiny_config(corpus, tmp_path / "a", **SMALL, checkpoint__async_save=True))
    monkeypatch.undo()
    train_tiny(tiny_config(corpus, tmp_path / "b", **SMALL))
    with pytest.raises(AssertionError):
        same(contents(tmp_path / "a"), contents(tmp_path / "b"))


def test_a_fault_in_the_background_ends_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CheckpointManager.save

    def fail(self: Any, step: int, *arguments: Any, **options: Any) -> Path:
        if step == 4:
            raise OSError("the disk went away")
        return original(self, step, *arguments, **options)

    monkeypatch.setattr(CheckpointManager, "save", fail)
    config = tiny_config(corpus, tmp_path, **SMALL, checkpoint__async_save=True)
    with pytest.raises(CheckpointError, match="step 4 was not saved.*the disk went away"):
        train_tiny(config)
    assert sorted(contents(tmp_path)) == [2]


def test_a_stop_waits_for_the_save_under_way(
    corpus: Path, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_scale.engine import saver

    original = saver.Saver.save

    def save(self: Any, step: int, *rest: Any) -> None:
        original(self, step, *rest)
        if step == 4:
            ask(tmp_path, "stop", "hold")

    monkeypatch.setattr(saver.Saver, "save", save)
    result = train_tiny(tiny_config(corpus, tmp_path, **SMALL, checkpoint__async_save=True))
    assert result["stopped"] == "the file STOP" and result["step"] == 5
    assert sorted(contents(tmp_path)) == [2, 4, 5]


def train_slowly(config: Any) -> Any:
    slow_saves(0.2 if __import__("os").environ["RANK"] == "1" else 0.0)
    return train_tiny(config)


def test_two_ranks_save_beside_training(corpus: Path, tmp_path: Path) -> None:
    """One of them later than the other; milestones stay beside the last ones."""
    keys = {"checkpoint__async_save": True, "checkpoint__keep_last": 1, "checkpoint__keep_every": 4}
    config = tiny_config(corpus, tmp_path / "a", **SMALL | keys)
    first, _ = run_distributed(train_slowly, 2, config, timeout_seconds=120)
    plain = tiny_config(corpus, tmp_path / "b", **SMALL)
    second, _ = run_distributed(train_tiny, 2, plain, timeout_seconds=120)
    assert first["losses"] == second["losses"]
    found = contents(tmp_path / "a")
    assert sorted(found) == [4, 8, 9]
    expected = contents(tmp_path / "b")
    same(found, {step: expected[step] for step in found})
