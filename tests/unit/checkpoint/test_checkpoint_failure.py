"""A save that fails leaves older checkpoints usable, nothing of the new one, and a clear error."""

import errno
import io
import multiprocessing
import os
import resource

import pytest
import torch

from spectral_scale.checkpoint import format as file_format
from spectral_scale.checkpoint import writer
from spectral_scale.checkpoint.format import create_file
from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.checkpoint.writer import save_checkpoint
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import whole


class FailingFile(io.FileIO):
    """Fails like a disk would, once `good_bytes` have been written."""

    def __init__(self, path, code, good_bytes):
        super().__init__(path, "xb")
        self.code = code
        self.left = good_bytes

    def write(self, data):
        if self.left <= 0:
            raise OSError(self.code, os.strerror(self.code))
        written = super().write(bytes(data[: max(1, self.left)]))
        self.left -= written
        return written


def failing(code, good_bytes, name="rank"):
    def open_new(path):
        if path.name.startswith(name):
            return FailingFile(path, code, good_bytes)
        return create_file(path)

    return open_new


def assert_untouched(checkpoints, names):
    assert checkpoints.names() == names
    assert checkpoints.check(checkpoints.manager().latest_good()) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("good_bytes", [0, 3, 500])
@pytest.mark.parametrize("name", ["rank", "manifest"])
def test_a_write_that_fails_leaves_nothing_behind(checkpoints, code, good_bytes, name):
    checkpoints.save(1)
    names = checkpoints.names()
    manager = checkpoints.manager(keep_last=1, open_new=failing(code, good_bytes, name))
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(2, manager)
    text = str(error.value)
    assert "step 2 was not saved" in text and "rank 0" in text and f"{name}" in text
    assert ("no space: need" in text) == (code != errno.EIO)
    assert_untouched(checkpoints, names)
    assert checkpoints.check(CheckpointReader.open(checkpoints.save(2))) == 2


def test_a_failed_replacement_leaves_the_old_one_of_that_step(checkpoints):
    checkpoints.save(1)
    with pytest.raises(CheckpointError):
        checkpoints.save(1, checkpoints.manager(open_new=failing(errno.ENOSPC, 100)))
    assert_untouched(checkpoints, ["step_00000001"])


def save_under_a_file_size_limit(checkpoints, pipe):
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        checkpoints.save(2)
        pipe.send("saved")
    except CheckpointError as error:
        pipe.send(str(error))


def test_the_kernels_own_refusal_to_write_more(checkpoints):
    """RLIMIT_FSIZE: a real write of the system fails half-way through the data file."""
    checkpoints.save(1)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=save_under_a_file_size_limit, args=(checkpoints, send))
    process.start()
    assert receive.poll(60)
    text = receive.recv()
    process.join()
    assert "no space: need" in text and "File too large" in text and "rank_00000" in text
    assert_untouched(checkpoints, ["step_00000001"])


def test_a_full_disk_is_predicted_before_a_byte_is_written(checkpoints, monkeypatch):
    checkpoints.save(1)
    needed = sum(t.numel() * t.element_size() for t in checkpoints.content(2).values())
    monkeypatch.setattr(writer, "free_bytes", lambda path: needed)
    opened = []
    manager = checkpoints.manager(open_new=lambda path: opened.append(path))
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(2, manager)
    for words in ("no space: need", "have", str(checkpoints.root), "checkpoint.keep_last"):
        assert words in str(error.value)
    assert opened == []
    assert_untouched(checkpoints, ["step_00000001"])
    monkeypatch.setattr(writer, "free_bytes", lambda path: 3 * needed + 10**4)
    checkpoints.save(2)


@pytest.mark.parametrize("nth", range(5))
def test_every_fsync_that_fails_is_an_error(checkpoints, monkeypatch, nth):
    """Data file, manifest, folder, root; a checkpoint that is visible after a failure is whole."""
    checkpoints.save(1)
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == nth + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if nth == 4:
        checkpoints.save(2)
        assert len(calls) == 4
        return
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoints.save(2)
    monkeypatch.undo()
    assert checkpoints.check(checkpoints.manager().latest_good()) == (2 if nth == 3 else 1)
    assert not [name for name in checkpoints.names() if name.startswith(".")]


class LyingFile(io.FileIO):
    def write(self, data):
        spoiled = bytearray(data)
        spoiled[-1] ^= 1
        return super().write(spoiled)


def lying_data_files(path):
    return LyingFile(path, "xb") if path.name.startswith("rank") else create_file(path)


def test_bytes_that_changed_on_their_way_to_the_disk_are_noticed(checkpoints):
    checkpoints.save(1)
    with pytest.raises(CheckpointError, match=r"read back: rank_00000\.safetensors.*sha256"):
        checkpoints.save(2, checkpoints.manager(open_new=lying_data_files))
    assert_untouched(checkpoints, ["step_00000001"])


def test_without_reading_back_the_lie_is_committed(checkpoints, monkeypatch):
    """The twin of the test above."""
    monkeypatch.setattr("spectral_scale.checkpoint.writer.verify_files", lambda *a: None)
    path = checkpoints.save(2, checkpoints.manager(open_new=lying_data_files))
    with pytest.raises(CheckpointError, match="sha256"):
        CheckpointReader.open(path)


PHASES = ["plan", "write", "read back"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_one_failing_rank_is_an_error_on_all_ranks(checkpoints, run_ranks, phase, culprit):
    checkpoints.save(1)

    def chunks(rank):
        yield whole(f"w{rank}", torch.full((50,), float(rank)))
        if phase == "plan" and rank == culprit:
            raise ValueError("the model broke")

    def open_new(path):
        culprits_file = path.name == f"rank_{culprit:05d}.safetensors"
        if phase == "write" and culprits_file:
            return FailingFile(path, errno.ENOSPC, 10)
        file = create_file(path)
        if phase == "read back" and culprits_file:
            file.write(b"x")
        return file

    def save(collective):
        manager = CheckpointManager(checkpoints.root, 2, collective, open_new=open_new)
        return manager.save(2, chunks(collective.rank), state={}, identity={})

    errors = run_ranks(3, save)
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert phase in str(error)
        assert str(error) == str(errors[0])
    if phase == "plan":
        assert f"rank {culprit}: plan: ValueError: the model broke" in str(errors[0])
        assert isinstance(errors[culprit].__cause__, ValueError)
    assert_untouched(checkpoints, ["step_00000001"])


def test_a_folder_that_cannot_be_made_is_a_clear_error(checkpoints):
    checkpoints.root.parent.mkdir(parents=True)
    checkpoints.root.write_text("a file")
    with pytest.raises(CheckpointError, match="rank 0: prepare: FileExistsError"):
        checkpoints.save(1)


def test_a_link_of_the_same_name_is_not_replaced(checkpoints, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    checkpoints.root.mkdir(parents=True)
    (checkpoints.root / "step_00000001").symlink_to(precious)
    with pytest.raises(CheckpointError, match="in the way"):
        checkpoints.save(1)
    assert precious.is_dir()


def test_tensors_are_written_one_by_one(tmp_path):
    """No file is assembled in memory first."""
    sizes = []

    class Watching(io.FileIO):
        def write(self, data):
            sizes.append(len(data))
            return super().write(data)

    chunks = [whole("a", torch.ones(10)), whole("b", torch.ones(20))]
    path = tmp_path / "x.safetensors"
    file_format.write_chunks(path, chunks, open_new=lambda path: Watching(path, "xb"))
    assert sizes[1:] == [40, 80]


def test_ranks_that_do_not_share_the_folder_are_an_error(tmp_path, run_ranks):
    def save(collective):
        root = tmp_path / f"node{collective.rank}"
        root.mkdir()
        chunk = whole(f"w{collective.rank}", torch.ones(3))
        return save_checkpoint(root, 1, [chunk], state={}, identity={}, collective=collective)

    for error in run_ranks(2, save):
        assert isinstance(error, CheckpointError) and "rank 1: write: FileNotFoundError" in str(
            error
        )
