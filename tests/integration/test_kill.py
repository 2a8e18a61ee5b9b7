"""SIGKILL at arbitrary instants: the run folder stays usable and the losses stay the same."""

import multiprocessing
import time
from pathlib import Path

import pytest

from spectral_scale.cli.main import main
from spectral_scale.metrics.history import load_history
from spectral_scale.testing.distributed import PRELOADED
from spectral_scale.testing.tiny import TINY

STEPS = 90


def arguments(corpus: Path, run_dir: Path) -> list[str]:
    values = TINY | {
        "data.train": corpus / "train",
        "data.validation": corpus / "valid",
        "train.run_dir": run_dir,
        "train.steps": STEPS,
        "train.eval_interval": 30,
        "checkpoint.interval": 7,
    }
    return ["train", *(f"--{key}={value}" for key, value in values.items())]


def train(words: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    raise SystemExit(main(words))


def start(words: list[str]) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=train, args=(words,))
    process.start()
    return process


def steps_logged(run_dir: Path) -> int:
    return max((line["step"] for line in load_history(run_dir).current()), default=0)


def losses(run_dir: Path) -> dict[int, float]:
    lines = load_history(run_dir).current()
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.timeout(300)
def test_killed_runs_end_with_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    straight = start(arguments(corpus, tmp_path / "straight"))
    straight.join()
    assert straight.exitcode == 0
    words = [*arguments(corpus, tmp_path / "killed"), "--metrics.report=true"]
    for moment in (15, 40, 65):
        process = start(words)
        while process.is_alive() and steps_logged(tmp_path / "killed") < moment:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run ended before it could be killed"
    last = start(words)
    last.join()
    assert last.exitcode == 0
    history = load_history(tmp_path / "killed")
    assert len(history.attempts()) == 4 and history.superseded()
    expected = losses(tmp_path / "straight")
    assert len(expected) == STEPS
    assert losses(tmp_path / "killed") == expected
    page = (tmp_path / "killed" / "report.html").read_text(encoding="utf-8")
    assert "Exact" in page and "Not exact" not in page
