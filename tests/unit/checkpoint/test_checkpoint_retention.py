"""What is kept, what is removed, and what is never touched."""

import shutil

import pytest

from spectral_scale.checkpoint.names import list_checkpoints
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.errors import ConfigError


def steps(checkpoints):
    return [int(path.name[-8:]) for path in list_checkpoints(checkpoints.root)]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_n_stay(checkpoints, keep_last):
    manager = checkpoints.manager(keep_last=keep_last)
    for step in range(10, 60, 10):
        checkpoints.save(step, manager)
        assert steps(checkpoints)[0] == step
    assert steps(checkpoints) == [50, 40, 30][:keep_last]
    assert len(checkpoints.names()) == keep_last


def test_a_fresh_process_removes_nothing_until_it_has_verified_enough(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step)
    manager = checkpoints.manager(keep_last=2)
    checkpoints.save(4, manager)
    assert steps(checkpoints) == [4, 3, 2, 1]
    checkpoints.save(5, manager)
    assert steps(checkpoints) == [5, 4]


def test_what_latest_good_verified_counts(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step)
    manager = checkpoints.manager(keep_last=2)
    assert manager.latest_good().step == 3
    checkpoints.save(4, manager)
    assert steps(checkpoints) == [4, 3]


def test_damaged_newer_ones_never_push_out_the_last_good_one(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step)
    for step in (2, 3):
        (checkpoints.root / f"step_{step:08d}" / "manifest.json").write_bytes(b"")
    manager = checkpoints.manager(keep_last=2)
    assert manager.latest_good().step == 1
    checkpoints.save(4, manager)
    assert steps(checkpoints) == [4, 3, 2, 1]
    checkpoints.save(5, manager)
    assert steps(checkpoints) == [5, 4]


def test_saving_below_damaged_newer_ones_keeps_them_and_replaces_them_in_turn(checkpoints):
    for step in (10, 20):
        checkpoints.save(step)
    (checkpoints.root / "step_00000020" / "manifest.json").unlink()
    manager = checkpoints.manager(keep_last=1)
    assert manager.latest_good().step == 10
    checkpoints.save(15, manager)
    assert steps(checkpoints) == [20, 15]
    checkpoints.save(20, manager)
    assert steps(checkpoints) == [20]
    assert checkpoints.check(checkpoints.manager().latest_good()) == 20


def test_only_exact_names_directly_in_the_folder_are_removed(checkpoints, tmp_path):
    outside = tmp_path / "precious"
    shutil.copytree(checkpoints.save(1), outside)
    keep = ["step_1", "step_000000010", "xstep_00000001", "step_00000001.bak", "STEP_00000001",
            "step_0000000a", "step_٠٠٠٠٠٠٠١", ".writing_step_1", "notes"]  # fmt: skip
    for name in keep:
        (checkpoints.root / name).mkdir()
    (checkpoints.root / "step_00000002").symlink_to(outside)
    (checkpoints.root / ".writing_step_00000002").symlink_to(outside)
    (checkpoints.root / "step_00000003").write_text("a file")
    manager = checkpoints.manager(keep_last=1)
    for step in (5, 6):
        checkpoints.save(step, manager)
    left = set(checkpoints.names())
    links = {"step_00000002", "step_00000003", ".writing_step_00000002"}
    assert left == {*keep, *links, "step_00000006"}
    CheckpointReader.open(outside)


def test_links_inside_a_removed_checkpoint_are_not_followed(checkpoints, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("x")
    manager = checkpoints.manager(keep_last=1)
    (checkpoints.save(1, manager) / "link").symlink_to(outside)
    checkpoints.save(2, manager)
    assert steps(checkpoints) == [2] and (outside / "file").exists()


def test_reading_changes_nothing_and_the_first_save_cleans_up(checkpoints):
    checkpoints.save(1)
    for name in (".writing_step_00000002", ".removing_step_00000000"):
        shutil.copytree(checkpoints.root / "step_00000001", checkpoints.root / name)
    before = checkpoints.names()
    manager = checkpoints.manager()
    assert checkpoints.check(manager.latest_good()) == 1
    assert checkpoints.names() == before
    checkpoints.save(3, manager)
    assert checkpoints.names() == ["step_00000001", "step_00000003"]


def test_one_moved_aside_by_a_killed_replacement_counts_and_comes_back(checkpoints):
    path = checkpoints.save(1)
    path.rename(checkpoints.root / ".replaced_step_00000001")
    manager = checkpoints.manager()
    assert checkpoints.check(manager.latest_good()) == 1
    checkpoints.save(2, manager)
    assert checkpoints.names() == ["step_00000001", "step_00000002"]


def test_one_that_cannot_be_removed_does_not_stop_the_run(checkpoints, monkeypatch, caplog):
    manager = checkpoints.manager(keep_last=1)
    checkpoints.save(1, manager)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("spectral_scale.checkpoint.manager.remove_checkpoint", refuse)
    checkpoints.save(2, manager)
    assert steps(checkpoints) == [2, 1]
    assert "could not be removed" in caplog.text


@pytest.mark.parametrize("keep_last", [0, -1])
def test_keeping_none_is_a_configuration_error(checkpoints, keep_last):
    with pytest.raises(ConfigError, match="checkpoint.keep_last"):
        checkpoints.manager(keep_last=keep_last)
