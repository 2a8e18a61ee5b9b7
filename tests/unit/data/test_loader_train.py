"""Training batches: one global sequence, however it is divided, read ahead or resumed."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from spectral_scale.config.stop_signals import STOP_SIGNALS
from spectral_scale.data import read_ahead
from spectral_scale.data.loader import TrainLoader
from spectral_scale.data.order import sample_ids
from spectral_scale.data.read_ahead import ReadAhead
from spectral_scale.data.tokens import TokenFolder, open_tokens
from spectral_scale.errors import ConfigError, DataError, WorkerError

Make = Callable[[int], TokenFolder]
S = 8
G = 12


def loader(folder: TokenFolder, **changes: int) -> TrainLoader:
    settings = {"sequence_length": S, "global_batch_size": G, "micro_batch_size": 2, "seed": 3}
    return TrainLoader(folder, **(settings | changes))


def rows(train: TrainLoader, start: int, stop: int) -> list[torch.Tensor]:
    """The (rank's) sequences of each step, inputs and last label, in order."""
    out = []
    for batch in train.steps(start, stop):
        inputs = torch.cat([micro.input_ids for micro in batch.micro_batches])
        labels = torch.cat([micro.labels for micro in batch.micro_batches])
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
        out.append(torch.cat([inputs, labels[:, -1:]], dim=1))
    return out


def test_batches_hold_the_packed_samples(counting_folder: Make) -> None:
    folder = counting_folder(401)
    train = loader(folder)
    assert train.num_samples == 50
    for step, found in enumerate(rows(train, 0, 10)):
        starts = torch.from_numpy(train.sample_ids(step)) * S
        expected = starts[:, None] + torch.arange(S + 1)
        assert torch.equal(found, (expected + 1) * (expected < 400))  # token i is i + 1, eos is 0
        assert found.dtype == torch.int64


def test_an_epoch_predicts_every_token_once(counting_folder: Make) -> None:
    train = loader(counting_folder(24 * S + 1))
    labels = [micro.labels for batch in train.steps(0, 2) for micro in batch.micro_batches]
    seen = torch.cat(labels).flatten().sort().values
    assert torch.equal(seen, torch.tensor([0, *range(2, 24 * S + 1)]))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("num_tokens", [100, 401, 5000])
def test_global_batch_does_not_depend_on_the_division(
    counting_folder: Make, world: int, micro: int, num_tokens: int
) -> None:
    folder = counting_folder(num_tokens)
    reference = rows(loader(folder, micro_batch_size=G), 0, 7)
    ranks = [
        rows(loader(folder, micro_batch_size=micro, data_rank=k, data_world_size=world), 0, 7)
        for k in range(world)
    ]
    for step, expected in enumerate(reference):
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), expected)


def test_strided_ranks_would_not_give_the_same_order(counting_folder: Make) -> None:
    """The test above can fail: another assignment of sequences to ranks is told apart."""
    reference = rows(loader(counting_folder(5000), micro_batch_size=G), 0, 1)[0]
    assert not torch.equal(torch.cat([reference[0::2], reference[1::2]]), reference)


def test_small_corpus_spans_epochs_inside_a_step(counting_folder: Make) -> None:
    train = loader(counting_folder(5 * S + 1))
    positions = np.arange(3 * G, 4 * G)
    assert np.array_equal(train.sample_ids(3), sample_ids(3, positions, 5))
    ids = np.concatenate([train.sample_ids(step) for step in range(5)])
    for epoch in range(12):
        assert sorted(ids[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert train.epoch_of(5) == 12.0


def test_resume_equals_the_tail(counting_folder: Make) -> None:
    folder = counting_folder(401)
    whole = rows(loader(folder), 0, 12)
    for start in (1, 5, 11):
        tail = rows(loader(folder), start, 12)
        assert all(torch.equal(a, b) for a, b in zip(tail, whole[start:], strict=True))
    assert [batch.step for batch in loader(folder).steps(5, 8)] == [5, 6, 7]
    assert list(loader(folder).steps(5, 5)) == []


def test_resume_reads_nothing_before_the_position(
    counting_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = loader(counting_folder(401))
    reads: list[int] = []
    read = TokenFolder.read
    monkeypatch.setattr(
        TokenFolder, "read", lambda self, a, b: (reads.append(a), read(self, a, b))[1]
    )
    next(train.steps(1000, 2000))
    assert reads == (train.sample_ids(1000) * S).tolist()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_the_same_bytes_and_draw_no_random_number(
    counting_folder: Make, num_workers: int
) -> None:
    folder = counting_folder(401)
    expected = rows(loader(folder), 2, 6)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = rows(loader(folder, num_workers=num_workers), 2, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def started_workers(monkeypatch: pytest.MonkeyPatch) -> list[ReadAhead]:
    """Every set of workers that is started from now on."""
    made: list[ReadAhead] = []
    enter = ReadAhead.__enter__
    monkeypatch.setattr(ReadAhead, "__enter__", lambda self: (made.append(self), enter(self))[1])
    return made


def test_workers_ignore_the_signals_that_stop_a_run(
    counting_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = started_workers(monkeypatch)
    steps = loader(counting_folder(401), num_workers=1).steps(0, 40)
    next(steps)
    time.sleep(0.2)  # the worker has set its handlers long since: it has delivered
    for number in STOP_SIGNALS:
        os.kill(made[0]._workers[0][0].pid, number)
    assert len(list(steps)) == 39


def test_workers_need_no_temporary_folder_and_no_shared_memory(
    counting_folder: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 120)  # no UNIX socket's name fits into it
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder = counting_folder(401)
    expected = rows(loader(folder), 0, 6)
    found = rows(loader(folder, num_workers=2), 0, 6)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert list(long.iterdir()) == []


def test_a_worker_that_is_killed_is_named(
    counting_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = started_workers(monkeypatch)
    steps = loader(counting_folder(401), num_workers=2).steps(0, 10_000)
    next(steps)
    pid = made[0]._workers[1][0].pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=f"loader process {pid} was killed by SIGKILL, .*memory"):
        list(steps)
    assert multiprocessing.active_children() == []


def test_a_worker_s_own_exception_is_shown(
    counting_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenFolder, "read", lambda self, a, b: 1 / 0)
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        list(loader(counting_folder(401), num_workers=1).steps(0, 3))


def test_a_worker_that_cannot_be_started_is_named(
    counting_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*args: object) -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_more)
    with pytest.raises(WorkerError, match="loader process 1 of 2 cannot be started"):
        list(loader(counting_folder(401), num_workers=2).steps(0, 3))


def test_the_wait_for_a_stopped_worker_can_be_given_up(
    counting_folder: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = started_workers(monkeypatch)
    monkeypatch.setattr(read_ahead, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(read_ahead, "WARN_SECONDS", 0.1)
    waits: list[float] = []

    def give_up(seconds: float) -> bool:
        waits.append(seconds)
        return seconds > 0.3

    steps = loader(counting_folder(401), num_workers=1).steps(0, 100_000, while_waiting=give_up)
    next(steps)
    process = made[0]._workers[0][0]
    os.kill(process.pid, signal.SIGSTOP)
    assert len(list(steps)) < 100_000 - 1  # what lay in the pipe came, and then no more
    assert waits[-1] > 0.3  # earlier waits, if the worker was slow, ended with a batch
    assert f"loader process {process.pid} is stopped" in caplog.text
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("suspended", [False, True])
def test_workers_end_with_a_parent_that_is_killed(counting_folder: Make, suspended: bool) -> None:
    """Also those that are suspended and could not look for their parent."""
    folder = counting_folder(401)
    program = (
        "import multiprocessing, os, signal\n"
        "from spectral_scale.data.loader import TrainLoader\n"
        "from spectral_scale.data.tokens import open_tokens\n"
        f"loader = TrainLoader(open_tokens({str(folder.path)!r}), sequence_length=8,\n"
        "    global_batch_size=512, micro_batch_size=512, seed=3, num_workers=2)\n"
        "steps = loader.steps(0, 10**6)\n"
        "next(steps)\n"
        "pids = [p.pid for p in multiprocessing.active_children()]\n"
        "print(*pids, flush=True)\n"
        f"for pid in pids * {suspended}:\n"
        "    os.kill(pid, signal.SIGSTOP)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=60)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, pids))


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_shard_stops_with_its_own_message(counting_folder: Make, num_workers: int) -> None:
    folder = counting_folder(401)
    file = folder.path / "shard_00000.bin"
    data = np.fromfile(file, dtype="<u2")
    data[7] = 60_000
    data.tofile(file)
    train = loader(open_tokens(folder.path), num_workers=num_workers)
    with pytest.raises(DataError, match=r"^\S*shard_00000\.bin: token 7 .* is id 60000"):
        list(train.steps(0, 10))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"global_batch_size": 10, "data_world_size": 3}, ["10", "3", "2"]),
        ({"micro_batch_size": 5}, ["12", "5"]),
        ({"micro_batch_size": 0}, ["micro_batch_size", "0"]),
        ({"global_batch_size": 0}, ["global_batch_size", "0"]),
        ({"sequence_length": 0}, ["sequence_length", "0"]),
        ({"data_rank": 2, "data_world_size": 2}, ["2"]),
    ],
)
def test_impossible_divisions_are_refused(
    counting_folder: Make, changes: dict[str, int], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        loader(counting_folder(401), **changes)
    assert all(number in str(caught.value) for number in named)


def test_corpus_shorter_than_a_sequence_is_refused(counting_folder: Make) -> None:
    loader(counting_folder(S + 1))
    with pytest.raises(DataError, match="8 tokens, at least 9 are required"):
        loader(counting_folder(S))


def test_fingerprint_changes_with_the_order_only(counting_folder: Make) -> None:
    folder = counting_folder(401)
    base = loader(folder).state_fingerprint
    divided = loader(folder, data_world_size=2, micro_batch_size=3, num_workers=1)
    assert divided.state_fingerprint == base
    for changes in ({"seed": 4}, {"sequence_length": 9}, {"global_batch_size": 6}):
        assert loader(folder, **changes).state_fingerprint != base
    assert loader(counting_folder(402)).state_fingerprint != base
