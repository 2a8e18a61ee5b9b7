"""Every kind of damage is noticed, named, and passed over for the checkpoint before it."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from spectral_scale.checkpoint import manifest as manifest_module
from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.checkpoint.strict_json import canonical
from spectral_scale.checkpoint.writer import save_checkpoint
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import TensorChunk

DATA, MANIFEST = "rank_00000.safetensors", "manifest.json"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def replace_by_link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def reindent(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))


DAMAGE = {
    "first byte of the data file": (DATA, lambda p: flip(p, 0), "sha256"),
    "header of the data file": (DATA, lambda p: flip(p, 20), "sha256"),
    "last byte of the data file": (DATA, lambda p: flip(p, -1), "sha256"),
    "truncated data file": (DATA, lambda p: truncate(p, 0.5), "truncated"),
    "empty data file": (DATA, lambda p: truncate(p, 0), "has 0 bytes"),
    "longer data file": (DATA, append, "bytes"),
    "missing data file": (DATA, Path.unlink, "missing"),
    "linked data file": (DATA, replace_by_link, "symbolic link"),
    "data file is a folder": (DATA, replace_by_folder, "not a regular file"),
    "first byte of the manifest": (MANIFEST, lambda p: flip(p, 0), "JSON"),
    "a byte inside the manifest": (MANIFEST, lambda p: flip(p, 40), "manifest.json"),
    "last byte of the manifest": (MANIFEST, lambda p: flip(p, -1), "manifest.json"),
    "truncated manifest": (MANIFEST, lambda p: truncate(p, 0.9), "truncated"),
    "empty manifest": (MANIFEST, lambda p: truncate(p, 0), "empty"),
    "missing manifest": (MANIFEST, Path.unlink, "missing"),
    "linked manifest": (MANIFEST, replace_by_link, "symbolic link"),
    "reformatted manifest": (MANIFEST, reindent, "canonical"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_is_used(checkpoints, caplog, kind):
    file, spoil, words = DAMAGE[kind]
    for step in (1, 2):
        checkpoints.save(step)
    spoil(checkpoints.root / "step_00000002" / file)
    with pytest.raises(CheckpointError) as error:
        CheckpointReader.open(checkpoints.root / "step_00000002")
    assert words in str(error.value) and file in str(error.value)
    before = checkpoints.names()
    assert checkpoints.check(checkpoints.manager().latest_good()) == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "step_00000002" in caplog.text and file in caplog.text and words in caplog.text
    assert checkpoints.names() == before


def test_no_byte_of_any_file_can_change_unnoticed(checkpoints):
    path = checkpoints.save(1)
    for file in (path / MANIFEST, path / DATA):
        original = file.read_bytes()
        for position in range(0, len(original), 7):
            flip(file, position)
            with pytest.raises(CheckpointError):
                CheckpointReader.open(path)
            file.write_bytes(original)
    checkpoints.check(CheckpointReader.open(path))


def test_without_verification_a_flipped_byte_would_pass(checkpoints):
    """Why hashing is the default: the twin of the test above."""
    path = checkpoints.save(1)
    flip(path / DATA, -1)
    reader = CheckpointReader.open(path, verify=False)
    wrong = [n for n, t in checkpoints.content(1).items() if not torch.equal(reader.read(n), t)]
    assert len(wrong) == 1


def test_all_bad_is_an_error_and_not_a_start_from_zero(checkpoints):
    for step in (1, 2):
        truncate(checkpoints.save(step) / DATA, 0.5)
    with pytest.raises(CheckpointError) as error:
        checkpoints.manager().latest_good()
    for words in ("none of the 2", "step_00000001", "step_00000002", DATA, "move the folder"):
        assert words in str(error.value)


def test_no_folder_and_an_empty_folder_are_no_checkpoint(checkpoints):
    assert checkpoints.manager().latest_good() is None
    checkpoints.root.mkdir(parents=True)
    assert checkpoints.manager().latest_good() is None


def test_a_renamed_checkpoint_is_not_taken_for_another_step(checkpoints):
    checkpoints.save(1).rename(checkpoints.root / "step_00000009")
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 1"):
        CheckpointReader.open(checkpoints.root / "step_00000009")


def test_damage_seen_by_one_rank_only_is_passed_over_by_all(run_ranks, checkpoints):
    def save(collective, step):
        row = TensorChunk("w", torch.full((1, 4), step), (2, 4), (collective.rank, 0))
        return save_checkpoint(
            checkpoints.root, step, [row], state={}, identity={}, collective=collective
        )

    for step in (1, 2):
        run_ranks(2, lambda c, step=step: save(c, step))
    flip(checkpoints.root / "step_00000002" / "rank_00001.safetensors", -1)

    def latest(collective):
        return CheckpointManager(checkpoints.root, 2, collective).latest_good().step

    assert run_ranks(3, latest) == [1, 1, 1]


# ---- manifests that are whole but hostile: their hash is right, their content is not


def rewrite(path: Path, edit) -> None:
    document = json.loads((path / MANIFEST).read_text())
    del document["manifest_sha256"]
    edit(document)
    write_signed(path, document)


def write_signed(path: Path, document: dict) -> None:
    sha256 = manifest_module._sha256(document)
    (path / MANIFEST).write_bytes(canonical({**document, "manifest_sha256": sha256}))


def rename_file(document: dict, name: str) -> None:
    document["files"][name] = document["files"].pop(DATA)
    for tensor in document["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk["file"] = name


def set_in(*keys, value):
    def edit(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return edit


W = ("tensors", "model/w")
HOSTILE = {
    "parent folder": (lambda d: rename_file(d, "../x.safetensors"), "not allowed"),
    "absolute path": (lambda d: rename_file(d, "/etc/x.safetensors"), "not allowed"),
    "two dots": (lambda d: rename_file(d, "a..safetensors"), "not allowed"),
    "hidden": (lambda d: rename_file(d, ".safetensors"), "not allowed"),
    "pickle": (lambda d: rename_file(d, "weights.pt"), "not allowed"),
    "distcp metadata": (lambda d: rename_file(d, ".metadata"), "not allowed"),
    "newline": (lambda d: rename_file(d, "x.safetensors\n"), "not allowed"),
    "new version": (set_in("format_version", value=2), "format_version is 2"),
    "no version": (lambda d: d.pop("format_version"), "reads 1"),
    "boolean version": (set_in("format_version", value=True), "format_version"),
    "gap": (set_in(*W, "chunks", 0, "shape", value=[36, 5]), "only 180 of 185"),
    "no chunks": (set_in(*W, "chunks", value=[]), "only 0 of 185"),
    "overlap": (
        lambda d: d["tensors"]["model/w"]["chunks"].append(
            copy.deepcopy(d["tensors"]["model/w"]["chunks"][0])
        ),
        "written twice",
    ),
    "huge tensor": (
        lambda d: d["tensors"]["model/w"].update(
            shape=[2**40, 5],
            chunks=[{**d["tensors"]["model/w"]["chunks"][0], "shape": [2**40, 5]}],
        ),
        "is larger than",
    ),
    "unlisted file": (set_in(*W, "chunks", 0, "file", value="x.safetensors"), "list of files"),
    "unknown dtype": (set_in(*W, "dtype", value="F31"), "unknown dtype 'F31'"),
    "negative size": (set_in("files", DATA, "bytes", value=-1), "not a count"),
    "not a hash": (set_in("files", DATA, "sha256", value="00"), "not a sha256"),
    "text for a list": (set_in(*W, "shape", value="37"), "must be a list"),
    "list for a mapping": (set_in("tensors", value=[]), "must be a dict"),
    "fraction": (set_in("step", value=1.5), "must be a int"),
    "missing field": (lambda d: d.pop("state"), "missing or unknown fields state"),
    "unknown field": (set_in("loader", value="os.system"), "fields loader"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_refused_before_anything_is_read(checkpoints, kind):
    edit, words = HOSTILE[kind]
    path = checkpoints.save(1)
    rewrite(path, edit)
    with pytest.raises(CheckpointError) as error:
        CheckpointReader.open(path, verify=False)
    assert words in str(error.value)


def test_the_rewriting_itself_makes_valid_manifests(checkpoints):
    path = checkpoints.save(1)
    rewrite(path, lambda document: None)
    checkpoints.check(CheckpointReader.open(path))


@pytest.mark.parametrize(
    "text",
    [b"[]", b"3", b'{"a": NaN}', b"[" * 100_000, b"\xff\xfe", b'{"format_version":1,"x":1e999}'],
)
def test_documents_that_are_no_manifest_are_errors_not_crashes(checkpoints, text):
    path = checkpoints.save(1)
    (path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        CheckpointReader.open(path)


def test_an_oversized_manifest_is_not_parsed(checkpoints, monkeypatch):
    path = checkpoints.save(1)
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CheckpointError, match="larger than"):
        CheckpointReader.open(path)


def test_key_shape_or_dtype_other_than_in_the_file_is_an_error(checkpoints):
    path = checkpoints.save(1)
    for edit, words in [
        (set_in(*W, "chunks", 0, "key", value="bank/u"), "the manifest says F32"),
        (set_in(*W, "chunks", 0, "key", value="nothing"), "nothing"),
        (set_in(*W, "dtype", value="I32"), "the manifest says I32"),
    ]:
        rewrite(path, edit)
        with pytest.raises(CheckpointError) as error:
            CheckpointReader.open(path).read("model/w")
        assert words in str(error.value)
        checkpoints.save(1)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    "name", [".metadata", "optimizer.pt", "rank_00000.pkl", "pytorch_model.bin"]
)
def test_pickles_are_never_opened(checkpoints, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    path = checkpoints.save(1)
    (path / name).write_bytes(pickle.dumps(Bomb()))
    checkpoints.check(CheckpointReader.open(path))
    rewrite(path, lambda document: rename_file(document, name))
    with pytest.raises(CheckpointError):
        CheckpointReader.open(path)
    assert not Path("exploded").exists()


def test_a_pickle_under_a_tensor_files_name_is_not_unpickled(checkpoints, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = checkpoints.save(1)
    data = pickle.dumps(Bomb()).ljust((path / DATA).stat().st_size, b"\0")
    (path / DATA).write_bytes(data)
    with pytest.raises(CheckpointError, match=DATA):
        CheckpointReader.open(path, verify=False).read("model/w")
    assert not Path("exploded").exists()
