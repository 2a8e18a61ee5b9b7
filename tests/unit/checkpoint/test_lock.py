"""One process a run folder; the dead hold nothing."""

import json
import multiprocessing
import os
import socket
import threading

import pytest

from spectral_scale.checkpoint import lock as lock_module
from spectral_scale.checkpoint.lock import RunLock, read_holder
from spectral_scale.errors import ConfigError

CONTEXT = multiprocessing.get_context("fork")


def hold(run_dir, ready):
    with RunLock(run_dir):
        ready.send(os.getpid())
        CONTEXT.Event().wait()


def gone_pid():
    gone = CONTEXT.Process(target=int)
    gone.start()
    gone.join()
    return gone.pid


@pytest.fixture
def holder(tmp_path):
    """A live process that has the lock of tmp_path/run; returns it."""
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=hold, args=(tmp_path / "run", send), daemon=True)
    process.start()
    assert receive.poll(30)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_told_who_runs_there(tmp_path, holder):
    with pytest.raises(ConfigError) as error:
        RunLock(tmp_path / "run").acquire()
    for words in (str(holder.pid), socket.gethostname(), "run folder", "train.run_dir"):
        assert words in str(error.value)
    assert error.value.exit_code == 78
    assert read_holder(tmp_path / "run").pid == holder.pid


def test_a_killed_holder_is_taken_over_with_a_warning(tmp_path, holder, caplog):
    holder.kill()
    holder.join()
    with RunLock(tmp_path / "run"):
        assert read_holder(tmp_path / "run").pid == os.getpid()
    assert "taking over" in caplog.text and str(holder.pid) in caplog.text


def test_released_locks_leave_no_holder_and_can_be_taken_again(tmp_path):
    lock = RunLock(tmp_path / "run")
    for _ in range(2):
        with lock:
            assert read_holder(tmp_path / "run").host == socket.gethostname()
            with pytest.raises(ConfigError):
                RunLock(tmp_path / "run").acquire()
        assert read_holder(tmp_path / "run") is None
    lock.release()


def test_a_refused_process_does_not_disturb_the_holders_file(tmp_path):
    with RunLock(tmp_path / "run"):
        before = (tmp_path / "run" / "lock.json").read_bytes()
        second = RunLock(tmp_path / "run")
        with pytest.raises(ConfigError):
            second.acquire()
        second.release()
        assert (tmp_path / "run" / "lock.json").read_bytes() == before


def test_an_orphan_that_still_has_the_lock_is_named_after_its_parent(tmp_path, holder, monkeypatch):
    """The lock is held, but its process is gone: a child inherited it."""
    monkeypatch.setattr(lock_module, "_ORPHAN_SECONDS", 0.2)
    pid = gone_pid()
    values = {"host": socket.gethostname(), "pid": pid, "started": "earlier"}
    (tmp_path / "run" / "lock.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"a child left by process {pid}"):
        RunLock(tmp_path / "run").acquire()


def test_an_orphan_that_leaves_in_time_is_waited_for(tmp_path, holder):
    values = {"host": socket.gethostname(), "pid": gone_pid(), "started": "earlier"}
    (tmp_path / "run" / "lock.json").write_text(json.dumps(values))
    threading.Timer(0.2, holder.kill).start()
    with RunLock(tmp_path / "run"):
        assert read_holder(tmp_path / "run").pid == os.getpid()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"host": "a", "pid": "x", "started": ""}'])
def test_an_unreadable_lock_file_does_not_block(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    with RunLock(tmp_path):
        assert read_holder(tmp_path).pid == os.getpid()


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be used"):
        RunLock(tmp_path / "file" / "run").acquire()
