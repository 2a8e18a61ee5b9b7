"""Files, clocks and counted starts by which a run ends; signals are tested beside them."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.cli.main import main
from spectral_scale.engine import loop
from spectral_scale.errors import ConfigError, NoProgressError
from spectral_scale.supervision import time_limit
from spectral_scale.supervision.control_files import ControlFiles, ask
from spectral_scale.supervision.restart_limit import RestartLimit
from spectral_scale.supervision.status import read_status, write_status
from spectral_scale.supervision.time_limit import TimeLimit
from spectral_scale.testing.tiny import tiny_words

CHANGES: dict[str, Any] = {"train__steps": 8, "model__num_layers": 1, "checkpoint__interval": 100}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Call `action()` inside a step's first micro-batch."""
    original, calls = loop.token_loss_sum, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (step - 1) * 6 + 1:
            action()
        return original(*arguments)

    monkeypatch.setattr(loop, "token_loss_sum", counted)


def train(corpus: Path, run_dir: Path, **changes: Any) -> int:
    return main(["train", *tiny_words(corpus, run_dir, **CHANGES | changes)])


def saved_steps(run_dir: Path) -> list[int]:
    return [CheckpointReader.open(p).step for p in sorted((run_dir / "checkpoints").glob("step_*"))]


@pytest.mark.parametrize(
    ("words", "saved", "requeue"),
    [((), [3], False), (("--now",), [], False)],
    ids=["saved", "now"],
)
def test_the_stop_command_stops_within_the_step(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    saved: list[int],
    requeue: bool,
) -> None:
    at_step(monkeypatch, 3, lambda: main(["stop", str(tmp_path), *words]))
    assert train(corpus, tmp_path) == 75
    assert saved_steps(tmp_path) == saved
    status = read_status(tmp_path)
    assert (status["state"], status["reason"]) == ("stopped", "stopped by the file STOP")
    assert (status["exit_code"], status["requeue"]) == (75, requeue)
    assert status["step"] == (saved or [0])[-1]
    assert not (tmp_path / "STOP").exists(), "the next start would stop, too"


def test_save_saves_and_goes_on_and_a_touched_stop_may_be_requeued(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = []

    def look() -> None:
        assert main(["stop", str(tmp_path), "--save-only"]) == 0
        capsys.readouterr()
        assert main(["status", str(tmp_path), "--format", "json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))

    at_step(monkeypatch, 2, look)
    assert train(corpus, tmp_path) == 0
    assert saved_steps(tmp_path) == [2, 8] and not (tmp_path / "SAVE").exists()
    assert shown[0]["active"] and shown[0]["ranks"][0]["pid"] == os.getpid()
    assert main(["status", str(tmp_path)]) == 0
    assert "completed: step 8 of 8\ncheckpoints: 2, 8\n" in capsys.readouterr().out
    at_step(monkeypatch, 1, (tmp_path / "STOP").touch)
    assert train(corpus, tmp_path, train__steps=12) == 75
    assert read_status(tmp_path)["requeue"] is True


def test_what_lies_there_before_the_start_is_not_meant_for_it(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "STOP").touch()
    assert train(corpus, tmp_path, train__steps=1) == 0
    assert "STOP was there before the start" in (tmp_path / "logs/rank_00000.log").read_text()
    assert main(["stop", str(tmp_path)]) == 78
    assert "no run is active" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "nothing")]) == 78


def test_files_say_how_to_stop(tmp_path: Path) -> None:
    control_files = ControlFiles(tmp_path)
    assert control_files.read().stop is None and not control_files.read().save
    for manner in ("hold", "now"):
        ask(tmp_path, "stop", manner)
        assert control_files.read().stop == manner
    (tmp_path / "STOP").write_text("please\n" * 1000)
    assert control_files.read().stop == "requeue"
    control_files.remove_all()
    assert control_files.read().stop is None


def test_the_time_limit_leaves_time_to_save(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The clock runs out inside step 3; then too little is left to start at all."""
    monkeypatch.setattr(time_limit, "UNMEASURED_SAVE_SECONDS", 0.0)
    left = math.inf
    monkeypatch.setattr(TimeLimit, "seconds_left", property(lambda self: left))

    def run_out() -> None:
        nonlocal left
        left = 1.0

    at_step(monkeypatch, 3, run_out)
    assert train(corpus, tmp_path) == 75
    assert read_status(tmp_path)["reason"] == "stopped by the end of its time"
    assert saved_steps(tmp_path) == [3]
    assert train(corpus, tmp_path) == 78
    assert "give the job more time" in capsys.readouterr().err


def test_the_margin_is_measured_and_the_nearest_end_counts() -> None:
    environment = {"SLURM_JOB_END_TIME": "1000"}
    limit = TimeLimit(None, environment=environment, now=lambda: 900.0)
    assert limit.seconds_left == pytest.approx(100, abs=5) and not limit.reached()
    limit.took_step(2.0)
    limit.took_save(20.0)
    limit.took_save(10.0)
    assert limit.margin_seconds == pytest.approx(2 + 1.5 * 20 + time_limit.SPARE_SECONDS)
    limit.took_save(80.0)
    assert limit.reached() and limit.save_seconds == 80.0
    known = TimeLimit(None, save_seconds=70.0, environment=environment, now=lambda: 900.0)
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME"):
        known.require_useful()
    assert TimeLimit(1e6, environment={}).seconds_left > 1e6
    both = TimeLimit(1e6, environment=environment, now=lambda: 900.0)
    assert both.source == "SLURM_JOB_END_TIME"
    with pytest.raises(ConfigError, match="not a number"):
        TimeLimit(None, environment={"SLURM_JOB_END_TIME": "tomorrow"})


def start(run_dir: Path, limit: int = 3) -> RestartLimit:
    restart_limit = RestartLimit(run_dir, steps=10, limit=limit)
    restart_limit.open()
    return restart_limit


def test_starts_that_lead_nowhere_end_the_third_time(tmp_path: Path) -> None:
    start(tmp_path)  # killed: no word
    assert start(tmp_path).failed("second") is None
    write_status(tmp_path, "failed", step=0, steps=10, reason="second")
    error = start(tmp_path).failed("third")
    assert isinstance(error, NoProgressError) and error.exit_code == 93
    assert "3 starts in a row saved nothing after step 0" in str(error) and "third" in str(error)
    assert read_status(tmp_path)["state"] == "no_progress"
    assert start(tmp_path).failed("fourth") is None, "a deliberate start begins the count anew"


def test_killed_starts_count_and_progress_or_order_begins_anew(tmp_path: Path) -> None:
    for _ in range(3):
        start(tmp_path)
    with pytest.raises(NoProgressError, match="killed without a word"):
        start(tmp_path)
    for _ in range(2):
        start(tmp_path)
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    for _ in range(3):
        last = start(tmp_path)
    assert last.failed("x") is not None, "two before the checkpoint do not count"
    for _ in range(5):
        start(tmp_path)
        write_status(tmp_path, "stopped", step=4, steps=10)
    for _ in range(5):
        start(tmp_path, limit=0)


def test_a_crash_loop_ends_in_93(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def crash() -> None:
        raise OSError("the disk is on fire")

    for _ in range(2):
        at_step(monkeypatch, 2, crash)
        with pytest.raises(OSError, match="on fire"):
            train(corpus, tmp_path)
        assert read_status(tmp_path)["state"] == "failed"
        monkeypatch.undo()
        monkeypatch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)
    assert train(corpus, tmp_path, model__num_heads=3) == 78, "a wrong setting is no start"
    at_step(monkeypatch, 2, crash)
    assert train(corpus, tmp_path) == 93
    assert "the disk is on fire" in capsys.readouterr().err
    assert read_status(tmp_path)["exit_code"] == 93
