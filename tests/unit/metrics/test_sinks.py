"""Sinks: what is written can be read back, and no failure of a sink reaches the run."""

import json
import logging
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from spectral_scale.metrics import MetricsLog, NullLog, read_metrics
from spectral_scale.metrics.sinks import from_plain, to_plain


def raw_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line_step_first_then_time(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(0, {"validation/loss": 9.0})
    log.write(10, {"train/loss": 8.5, "spectral/spectrum/q_proj": [3.0, 1.0]})
    log.close()
    first, second = raw_lines(tmp_path)
    assert list(second)[:2] == ["step", "time"]
    assert first["event"] == "start" and "event" not in second
    assert second["train/loss"] == 8.5 and second["spectral/spectrum/q_proj"] == [3.0, 1.0]
    assert abs(second["time"] - (tmp_path / "metrics.jsonl").stat().st_mtime) < 60
    assert log.failures == 0


def test_lines_are_on_disk_before_close(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(0, {"train/loss": 1.0})
    assert raw_lines(tmp_path)[0]["train/loss"] == 1.0


def test_opening_line_precedes_a_write_at_another_step(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=20)
    log.write(30, {"train/loss": 1.0})
    opening, line = raw_lines(tmp_path)
    assert (opening["step"], opening["event"]) == (20, "resume")
    assert line["step"] == 30 and "event" not in line


def test_own_keys_win_over_the_callers(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(3, {"step": 99, "time": -1.0})
    line = raw_lines(tmp_path)[-1]
    assert line["step"] == 3 and line["time"] > 0


def test_nothing_is_touched_before_the_first_write(tmp_path):
    log = MetricsLog(tmp_path / "run", tensorboard=True)
    log.close()
    assert not (tmp_path / "run").exists() and log.failures == 0


def test_non_finite_numbers_survive_strict_json(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(0, {"a": math.nan, "b": math.inf, "c": [-math.inf, 1.0], "d": {"e": math.nan}})

    def refuse(name):
        raise AssertionError(f"bare {name} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"]) and line["b"] == math.inf
    assert line["c"] == [-math.inf, 1.0] and math.isnan(line["d"]["e"])


@pytest.mark.parametrize("value", [1, 1.5, "text", [1.0, [2.0]], {"k": [1]}, True, None, -0.0])
def test_plain_values_round_trip(value):
    assert from_plain(json.loads(json.dumps(to_plain(value)))) == value


def test_tensors_and_paths_become_plain():
    assert to_plain(torch.tensor(2.5)) == 2.5
    assert to_plain(torch.tensor([math.nan, 1.0])) == ["NaN", 1.0]
    assert to_plain(Path("a/b")) == "a/b"


def test_line_cut_by_a_kill_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 9.0}\n{"step": 10, "tra')
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=0)
    log.write(10, {"train/loss": 8.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 10]
    assert read_metrics(tmp_path)[-1]["train/loss"] == 8.0


def test_unusable_folder_warns_once_and_counts(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the folder should be")
    log = MetricsLog(tmp_path / "run", tensorboard=False)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.write(step, {"train/loss": 1.0})
        log.close()
    assert log.failures == 3
    assert len(caplog.records) == 1 and "metrics.jsonl" in caplog.text


def test_full_disk_loses_lines_only_while_full(tmp_path, monkeypatch, caplog):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(0, {"train/loss": 3.0})
    true_write = os.write
    # A full disk takes the first bytes and refuses the rest.
    monkeypatch.setattr(os, "write", lambda fd, data: true_write(fd, data[:9]))
    log.write(1, {"train/loss": 2.0})
    monkeypatch.undo()
    log.write(2, {"train/loss": 1.0})
    log.close()
    assert log.failures == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2]


def test_a_long_failure_holds_no_files_and_no_frames(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "cut')
    log = MetricsLog(tmp_path, tensorboard=False)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    monkeypatch.setattr(os, "write", full)
    for step in range(50):
        log.write(step, {"train/loss": 2.0})
    monkeypatch.undo()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert log.failures == 50 and after == before


def test_tensorboard_is_given_up_after_its_first_failure(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    calls = []

    def fail(self, *arguments):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(0, {"train/loss": 2.0})
    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    for step in range(1, 5):
        log.write(step, {"train/loss": 2.0})
    log.close()
    assert len(calls) == 1 and log.failures == 4
    assert len(read_metrics(tmp_path)) == 5


def test_lost_opening_line_is_written_with_the_next(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, tensorboard=False, resume_step=5)
    monkeypatch.setattr(os, "write", full)
    log.write(6, {"train/loss": 2.0})
    monkeypatch.undo()
    log.write(7, {"train/loss": 1.0})
    assert [line["step"] for line in raw_lines(tmp_path)] == [5, 7]


def test_a_sink_that_fails_does_not_harm_the_other(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(0, {"train/loss": 2.0})
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert log.failures == 2 and len(caplog.records) == 1 and "tensorboard" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_value_that_cannot_be_converted_is_counted_not_raised(tmp_path):
    class Broken:
        def tolist(self):
            raise RuntimeError("device lost")

    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(0, {"train/loss": Broken()})
    assert log.failures == 1


def events(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    return accumulator.Reload()


def test_tensorboard_scalars_histograms_and_purge_on_resume(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=True)
    for step in (0, 10, 20):
        log.write(step, {"train/loss": float(step), "event": "text", "bad": math.nan})
    log.close()
    log = MetricsLog(tmp_path, tensorboard=True, resume_step=10)
    log.write(20, {"train/loss": 21.0, "sigma": [1.0, 2.0, math.inf], "names": ["a"]})
    log.write(30, {"train/loss": 30.0, "sigma": []})
    log.close()
    log.close()
    board = events(tmp_path)
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [
        (0, 0.0),
        (10, 10.0),
        (20, 21.0),
        (30, 30.0),
    ]
    assert [h.step for h in board.Histograms("sigma")] == [20]
    assert board.Histograms("sigma")[0].histogram_value.num == 2
    assert set(board.Tags()["scalars"]) == {"train/loss", "bad"}
    assert log.failures == 0


def test_null_log_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = NullLog()
    log.write(0, {"train/loss": 1.0})
    log.close()
    assert log.failures == 0 and not list(tmp_path.iterdir())
