"""Asked to stop: the step is finished and saved, exit code 75, and the same command goes on."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.cli.main import main
from spectral_scale.config.stop_signals import STOP_SIGNALS
from spectral_scale.engine import loop
from spectral_scale.metrics.history import read_metrics
from spectral_scale.supervision import signals as stop
from spectral_scale.testing.distributed import PRELOADED, run_distributed
from spectral_scale.testing.tiny import tiny_words

STEPS = 10  # swaps after 4 and 8; 6 micro-batches a step in one process
SIGNALLED = 5
CHANGES: dict[str, Any] = {"train__steps": STEPS, "checkpoint__interval": 3}


def signal_self_in_step(step: int, signals: Sequence[int], *, micro_batches: int = 6) -> None:
    """From now on, send this process `signals` inside a step's second micro-batch."""
    original, calls = loop.token_loss_sum, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (step - 1) * micro_batches + 2:
            for number in signals:
                os.kill(os.getpid(), number)
        return original(*arguments)

    loop.token_loss_sum = counted


@pytest.fixture(autouse=True)
def unchanged_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo `signal_self_in_step` after each test, and render no report."""
    monkeypatch.setattr(loop, "token_loss_sum", loop.token_loss_sum)
    monkeypatch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)


def losses(run_dir: Path) -> dict[int, float]:
    return {m["step"]: m["train/loss"] for m in read_metrics(run_dir) if "train/loss" in m}


def status(run_dir: Path) -> tuple[str, int, str]:
    found = json.loads((run_dir / "status.json").read_text())
    return found["state"], found["step"], found["reason"]


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, each of which is undamaged."""
    return [CheckpointReader.open(p).step for p in sorted((run_dir / "checkpoints").glob("step_*"))]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert main(["train", *tiny_words(corpus, run_dir, **CHANGES)]) == 0
    return losses(run_dir)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_the_step_is_finished_saved_and_continued(
    corpus: Path,
    tmp_path: Path,
    undisturbed: dict[int, float],
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)  # tests may be run under nohup, which ignores SIGHUP
    words = ["train", *tiny_words(corpus, tmp_path, **CHANGES)]
    signal_self_in_step(SIGNALLED, [number])
    assert main(words) == 75
    error = capsys.readouterr().err
    assert f"stopped at step {SIGNALLED} of {STEPS} and saved" in error
    assert "run the same command again to continue" in error
    assert status(tmp_path) == ("stopped", SIGNALLED, f"stopped by {number.name}")
    assert saved_steps(tmp_path) == [3, SIGNALLED]
    assert signal.getsignal(number) == before
    assert main(words) == 0
    assert f"resuming at step {SIGNALLED} of {STEPS}" in capsys.readouterr().err
    assert status(tmp_path) == ("completed", STEPS, "")
    assert losses(tmp_path) == undisturbed


def test_a_signal_in_the_last_step_changes_nothing(
    corpus: Path, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    signal_self_in_step(STEPS, [signal.SIGTERM])
    assert main(["train", *tiny_words(corpus, tmp_path, **CHANGES)]) == 0
    assert status(tmp_path) == ("completed", STEPS, "")
    assert losses(tmp_path) == undisturbed


def train_and_signal(words: list[str], signals: list[int], echo_seconds: float) -> None:
    """In a process of its own, which a signal may end."""
    stop.ECHO_SECONDS = echo_seconds
    signal_self_in_step(SIGNALLED, signals)
    sys.exit(main(words))


def test_one_ctrl_c_under_a_launcher_is_one_request(corpus: Path, tmp_path: Path) -> None:
    """The terminal's SIGINT and the launcher's signals arrive together; the step is still saved."""
    words = ["train", *tiny_words(corpus, tmp_path, **CHANGES)]
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    assert exit_code(train_and_signal, words, signals, stop.ECHO_SECONDS) == 75
    assert saved_steps(tmp_path) == [3, SIGNALLED]
    assert status(tmp_path)[2] == "stopped by SIGINT"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(
    corpus: Path, tmp_path: Path, undisturbed: dict[int, float], number: signal.Signals
) -> None:
    """One that does not come together with the first: here, no time is close enough for that."""
    words = ["train", *tiny_words(corpus, tmp_path, **CHANGES)]
    assert exit_code(train_and_signal, words, [number, number], -1.0) == -number
    assert saved_steps(tmp_path) == [3]
    assert max(losses(tmp_path)) == SIGNALLED - 1
    assert main(words) == 0
    assert losses(tmp_path) == undisturbed


def exit_code(function: Callable[..., None], *arguments: Any) -> int | None:
    """Exit code of a fresh process, negative if a signal ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    return process.exitcode


def train_as_a_rank(words: list[str], signalled_rank: int | None) -> int:
    """One of several ranks, perhaps the one that is signalled; the exit code."""
    if os.environ["RANK"] == str(signalled_rank):
        signal_self_in_step(SIGNALLED, [signal.SIGTERM], micro_batches=3)
    return main(words)


@pytest.mark.parametrize("signalled_rank", [0, 1])
def test_one_rank_s_signal_stops_all(
    corpus: Path, tmp_path: Path, undisturbed: dict[int, float], signalled_rank: int
) -> None:
    words = ["train", *tiny_words(corpus, tmp_path, **CHANGES)]
    assert run_distributed(train_as_a_rank, 2, words, signalled_rank) == [75, 75]
    state, step, reason = status(tmp_path)
    assert (state, step) == ("stopped", SIGNALLED)
    own = "stopped by SIGTERM"
    assert reason == (own if signalled_rank == 0 else "stopped by SIGTERM to rank 1")
    assert saved_steps(tmp_path) == [3, SIGNALLED]
    assert run_distributed(train_as_a_rank, 2, words, None) == [0, 0]
    found = losses(tmp_path)
    assert found.keys() == undisturbed.keys()
    assert found == pytest.approx(undisturbed, abs=1e-5)


def start(words: list[str], log: Path, *launcher: str) -> subprocess.Popen[bytes]:
    """The command in a session of its own, its output in `log`."""
    command = [sys.executable, "-m", *launcher, "spectral_scale", *words]
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(loop.__file__).parents[2])}


def wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int, log: Path) -> None:
    """Return once a step was logged. Fails with the output if the process ended before."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


MANY = {"train__steps": 100_000, "metrics__progress": False}


def test_a_process_of_its_own_is_stopped_from_outside(
    corpus: Path, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """The command itself, signalled at a moment that nobody chose."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = ["train", *tiny_words(corpus, run_dir, **CHANGES | MANY)]
    process = start(words, log)
    try:
        wait_for_step(process, run_dir, 3, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()
    finally:
        process.kill()
    state, step, reason = status(run_dir)
    assert (state, reason) == ("stopped", "stopped by SIGTERM") and step >= 3
    assert f"stopped at step {step} of 100000 and saved" in log.read_text()
    assert saved_steps(run_dir)[-1] == step
    found = losses(run_dir)
    assert max(found) == step
    shared = found.keys() & undisturbed.keys()
    assert len(shared) >= 3 and all(found[s] == undisturbed[s] for s in shared)


def test_a_closed_terminal_does_not_end_what_nohup_started(
    corpus: Path, tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_self_in_step(SIGNALLED, [signal.SIGHUP])
        assert main(["train", *tiny_words(corpus, tmp_path, **CHANGES)]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert losses(tmp_path) == undisturbed


def test_a_closed_terminal_under_nohup_torchrun_saves(corpus: Path, tmp_path: Path) -> None:
    """torchrun takes SIGHUP in spite of nohup, and hands it to its ranks."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = ["train", *tiny_words(corpus, run_dir, **CHANGES | MANY)]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
        process = start(words, log, *torchrun)
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        wait_for_step(process, run_dir, 3, log)
        process.send_signal(signal.SIGHUP)
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    state, step, _ = status(run_dir)
    assert state == "stopped", log.read_text()
    assert saved_steps(run_dir)[-1] == step


def test_ctrl_c_under_torchrun_saves_once_on_all_ranks(corpus: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to the whole group, and torchrun hands it to its workers again."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = ["train", *tiny_words(corpus, run_dir, **CHANGES | MANY)]
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    process = start(words, log, *torchrun)
    try:
        wait_for_step(process, run_dir, 3, log)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    state, step, reason = status(run_dir)
    assert (state, reason) == ("stopped", "stopped by SIGINT"), log.read_text()
    assert saved_steps(run_dir)[-1] == step
    assert max(losses(run_dir)) == step
