"""A rank that dies, stops or loops: the others leave soon, and say which, where and why."""

import signal
import socket
import time
from pathlib import Path

import pytest
from ranks import Ranks, change_loss

from spectral_scale.metrics.history import load_history
from spectral_scale.supervision.status import read_status

HOST = socket.gethostname()
BAD_STEP = 7


def loops_for_ever(rank: int) -> None:
    def loop(_: object) -> None:
        while True:
            time.sleep(0.01)

    change_loss(rank, {(1, BAD_STEP)}, loop)


def holds_the_interpreter(rank: int) -> None:
    """As an extension that never returns: no other thread of the rank runs again."""
    import re

    change_loss(rank, {(1, BAD_STEP)}, lambda _: re.match(r"(a+)+$", "a" * 64 + "b"))


def raises(rank: int) -> None:
    def fail(_: object) -> None:
        raise ValueError("a wrong number in the data")

    change_loss(rank, {(1, BAD_STEP)}, fail)


def test_a_killed_rank_is_named_at_once(corpus: Path, tmp_path: Path) -> None:
    with Ranks(corpus, tmp_path) as ranks:
        ranks.wait_for_step(6)
        pid = ranks.processes[1].pid
        ranks.signal(1, signal.SIGKILL)
        assert ranks.exit_codes() == [75, -signal.SIGKILL]
        error = ranks.output(0)
    assert f"rank 1 on {HOST} (process {pid}) died" in error
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["requeue"]) == ("failed", 75, True)
    assert status["step"] >= 5 and "rank 1" in status["reason"]
    assert "Connection" in (tmp_path / "logs" / "rank_00000.log").read_text(), "the first error"


def test_without_a_new_checkpoint_there_is_nothing_to_requeue(corpus: Path, tmp_path: Path) -> None:
    with Ranks(corpus, tmp_path, checkpoint__interval=1000) as ranks:
        ranks.wait_for_step(3)
        ranks.signal(0, signal.SIGKILL)
        assert ranks.exit_codes() == [-signal.SIGKILL, 1]
        assert f"rank 0 on {HOST}" in ranks.output(1)
    status = read_status(tmp_path)  # by rank 1, in place of rank 0
    assert (status["state"], status["exit_code"], status["requeue"]) == ("failed", 1, False)
    assert "rank 0" in status["reason"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run(corpus: Path, tmp_path: Path, stopped: int) -> None:
    """Nothing of it is left, and it tells where it stood."""
    with Ranks(corpus, tmp_path) as ranks:
        ranks.wait_for_step(6)
        ranks.signal(stopped, signal.SIGSTOP)
        ranks.processes[stopped].join(60)
        status = read_status(tmp_path)  # a launcher may kill its writer from now on
        assert status["state"] == "failed" and f"rank {stopped}" in status["reason"]
        codes = ranks.exit_codes()
        assert codes[1 - stopped] == 75
        assert codes[stopped] == -signal.SIGABRT, "it was left behind, or could not tell"
        assert f"rank {stopped} on {HOST}" in ranks.output(1 - stopped)
        assert "has given no sign of life" in ranks.output(1 - stopped)
        assert "engine/loop.py" in ranks.stacks(stopped)
        assert "engine/loop.py" in ranks.stacks(1 - stopped)


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (loops_for_ever, "nothing has moved"),
        (holds_the_interpreter, "has given no sign of life"),
    ],
    ids=["a loop", "a loop that holds the interpreter"],
)
def test_a_rank_that_loops_is_found(corpus: Path, tmp_path: Path, before, says: str) -> None:
    with Ranks(corpus, tmp_path, before=before) as ranks:
        codes = ranks.exit_codes()
        assert None not in codes and codes[0] == 75, ranks.output()
        error = ranks.output(0)
    assert says in error and f"rank 1 on {HOST}" in error
    assert "test_lost_ranks.py" in ranks.stacks(1)


def test_one_rank_s_own_error_is_what_all_report(corpus: Path, tmp_path: Path) -> None:
    with Ranks(corpus, tmp_path, before=raises) as ranks:
        codes = ranks.exit_codes()
        assert codes[1] == 1 and codes[0] == 75, ranks.output()
        assert "ValueError: a wrong number in the data" in ranks.output(1)
        assert "a wrong number in the data" in ranks.output(0)
    assert "a wrong number in the data" in read_status(tmp_path)["reason"]


def is_slow(rank: int) -> None:
    from spectral_scale.engine import loop

    if rank == 1:
        product = loop.token_loss_sum
        loop.token_loss_sum = lambda *a: (time.sleep(0.1), product(*a))[1]


def test_a_slow_rank_is_named(corpus: Path, tmp_path: Path) -> None:
    with Ranks(corpus, tmp_path, before=is_slow, train__steps=6) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.output()
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert f"rank 1 on {HOST} keeps the others waiting" in log
    lines = load_history(tmp_path).current()
    assert [line["ranks/slowest"] for line in lines if "ranks/slowest" in line][1:] == [1] * 5
