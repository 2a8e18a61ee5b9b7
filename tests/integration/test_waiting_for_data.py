"""A stop that comes while training waits for data that does not come is honoured."""

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.cli.main import main
from spectral_scale.data.loader import TrainLoader
from spectral_scale.supervision import supervisor
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_words

STUCK = 4
"""The last step whose data comes."""
CHANGES = {"train__steps": 10, "checkpoint__interval": 3, "data__num_workers": 1}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)
    monkeypatch.setattr(TrainLoader, "_read_micro_batch", TrainLoader._read_micro_batch)


def data_stops(rank: int | None = None) -> None:
    """From now on, loader workers (of one rank) hang when they come to the step after STUCK."""
    read = TrainLoader._read_micro_batch

    def hang(self: TrainLoader, number: int) -> object:
        if number >= STUCK * self.gradient_accumulation_steps and rank in (
            None,
            int(os.environ.get("RANK", 0)),
        ):
            time.sleep(1000)
        return read(self, number)

    TrainLoader._read_micro_batch = hang  # type: ignore[assignment]


def when_stuck(run_dir: Path, act: str) -> None:
    """Ask this process to stop, by a signal or the file STOP, two seconds after step STUCK."""

    def ask() -> None:
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and f'"step": {STUCK},' in metrics.read_text()):
            time.sleep(0.05)
        time.sleep(2)
        if act == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            (run_dir / "STOP").touch()

    threading.Thread(target=ask, daemon=True).start()


@pytest.mark.parametrize("act", ["signal", "file"])
def test_one_process_saves_and_stops(
    corpus: Path, tmp_path: Path, act: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data_stops()
    when_stuck(tmp_path, act)
    assert main(["train", *tiny_words(corpus, tmp_path, **CHANGES)]) == 75
    assert f"stopped at step {STUCK} of 10 and saved" in capsys.readouterr().err
    saved = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert CheckpointReader.open(saved[-1]).step == STUCK
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"


def rank(words: Sequence[str], run_dir: Path) -> tuple[int, float]:
    """One of two ranks; rank 1's data stops, and both are signalled meanwhile."""
    supervisor.WAIT_AFTER_STOP_SECONDS = 2.0
    data_stops(rank=1)
    when_stuck(run_dir, "signal")
    code = main(words)
    return code, time.time()


def test_several_ranks_end_and_name_it(corpus: Path, tmp_path: Path) -> None:
    words = ["train", *tiny_words(corpus, tmp_path, **CHANGES)]
    found = run_distributed(rank, 2, words, tmp_path)
    assert [code for code, _ in found] == [75, 75]
    failure = json.loads((tmp_path / "status.json").read_text())
    assert "while rank 1 had waited" in failure["reason"]
    saved = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert [CheckpointReader.open(path).step for path in saved] == [3]
