"""`spectral-scale verify`: what it prints and how it exits."""

import argparse
import json

import pytest

from spectral_scale.cli import verify
from spectral_scale.errors import CheckpointError


def run(*arguments):
    parser = argparse.ArgumentParser()
    verify.add_parser(parser.add_subparsers())
    args = parser.parse_args(["verify", *map(str, arguments)])
    return args.run(args)


def spoil(path):
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.fixture
def three(checkpoints):
    for step in (100, 200, 300):
        checkpoints.save(step)
    return checkpoints


def test_all_good_from_run_folder_checkpoints_folder_and_single(three, capsys):
    assert run(three.root.parent) == 0
    assert capsys.readouterr().out.count("good") == 3
    assert run(three.root) == 0
    assert capsys.readouterr().out.count("good") == 3
    assert run(three.root / "step_00000200") == 0
    out = capsys.readouterr().out
    assert out.count("good") == 1 and "200" in out


def test_the_newest_decides_the_exit_code(three, capsys):
    spoil(three.root / "step_00000100")
    assert run(three.root) == 0
    assert "BAD   rank_00000.safetensors: has" in capsys.readouterr().out
    spoil(three.root / "step_00000300")
    assert run(three.root) == 1
    assert run(three.root / "step_00000100") == 1
    assert run(three.root / "step_00000200") == 0


def test_json_lists_newest_first(three, capsys):
    spoil(three.root / "step_00000300")
    assert run(three.root, "--format", "json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [300, 200, 100]
    assert [row["good"] for row in rows] == [False, True, True]
    assert "truncated" in rows[0]["fault"] and rows[1]["fault"] is None
    assert rows[1]["bytes"] > 0 and rows[0]["bytes"] > 0


def test_a_checkpoint_without_manifest_is_bad_not_absent(three):
    (three.root / "step_00000300" / "manifest.json").unlink()
    assert run(three.root / "step_00000300") == 1


def test_nothing_there_says_what_to_give(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "step_00000001"):
        with pytest.raises(CheckpointError, match="give a run folder"):
            run(path)


def test_verifying_changes_nothing(three):
    spoil(three.root / "step_00000300")
    before = sorted(p.stat().st_mtime_ns for p in three.root.rglob("*"))
    run(three.root)
    assert sorted(p.stat().st_mtime_ns for p in three.root.rglob("*")) == before
