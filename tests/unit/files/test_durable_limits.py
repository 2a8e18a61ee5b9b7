"""File systems without locks, without fsync of folders, and that tell no free space."""

import errno
import fcntl
import json
import logging
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectral_scale.checkpoint.lock import RunLock, is_held
from spectral_scale.cli.main import main
from spectral_scale.data.output_folder import locked
from spectral_scale.errors import ConfigError, DataError
from spectral_scale.files.durable import free_bytes, fsync_directory, fsync_path
from spectral_scale.testing.tiny import tiny_words


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(params=[errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def no_folder_fsync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(request.param, os.strerror(request.param))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = SimpleNamespace(f_blocks=0, f_bavail=0, f_bfree=0, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: zero)


@pytest.mark.usefixtures("no_locks")
def test_a_marker_stands_for_a_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunLock(tmp_path):
        assert "this file system has no locks" in caplog.text
        assert is_held(tmp_path)
        with pytest.raises(ConfigError, match=r"in use by process \d+ .*remove .*\.lock\.soft"):
            RunLock(tmp_path).acquire()
    assert not is_held(tmp_path)
    with RunLock(tmp_path):
        pass
    assert not (tmp_path / ".lock.soft").exists()


@pytest.mark.usefixtures("no_locks")
def test_a_marker_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        lock = RunLock(tmp_path).acquire()  # kept: a lock that nobody refers to is released
        os._exit(0 if lock else 1)
    os.waitpid(pid, 0)
    assert (tmp_path / ".lock.soft").exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


@pytest.mark.usefixtures("no_locks")
def test_two_preparations_without_locks(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(DataError, match="another process is preparing"):
        with locked(tmp_path / "out"):
            pass
    with locked(tmp_path / "out"):
        pass


@pytest.mark.usefixtures("no_folder_fsync")
def test_folders_that_cannot_be_flushed(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not fsync_directory(tmp_path)
    (tmp_path / "a.txt").write_text("words of a document\n")
    assert fsync_path(tmp_path / "a.txt")
    output = tmp_path / "out"
    words = ["prepare", "--input", str(tmp_path / "a.txt"), "--train-bpe", "257"]
    assert main([*words, "--workers", "1", "--output", str(output)]) == 0
    assert f"{output}: this file system cannot flush names to disk" in caplog.text
    assert (output / "index.json").is_file()


def test_a_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_directory(tmp_path)


@pytest.mark.usefixtures("no_statistics")
def test_free_space_that_is_unknown_stops_no_save(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert free_bytes(tmp_path) is None
    caplog.set_level(logging.WARNING)
    changes = {"train__steps": 2, "checkpoint__interval": 2}
    assert main(["train", *tiny_words(corpus, tmp_path / "run", **changes)]) == 0
    assert "does not tell its free space" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
