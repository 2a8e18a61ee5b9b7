"""Token folders: what is written is read, and whatever is wrong is named."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.data.token_index import INDEX_NAME, confined_path, parse_index
from spectral_scale.data.tokens import TokenFolder, open_tokens
from spectral_scale.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
STREAM = [5, 6, 7, 0, 8, 0, 9, 10, 11, 12, 0, 13, 14, 0]
Make = Callable[..., TokenFolder]


def edit_index(folder: TokenFolder, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder.path / INDEX_NAME
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("shard_tokens", [1, 3, 6, 100])
def test_stream_and_documents_do_not_depend_on_shards(make_folder: Make, shard_tokens: int) -> None:
    folder = make_folder(DOCUMENTS, shard_tokens=shard_tokens)
    assert folder.num_tokens == 14
    assert folder.read(0, 14).tolist() == STREAM
    assert folder.read(0, 14).dtype == np.int64
    assert folder.document_starts.tolist() == [0, 4, 6, 11]
    for start in range(15):
        for stop in range(start, 15):
            assert folder.read(start, stop).tolist() == STREAM[start:stop]
    folder.verify()


def test_shards_end_with_documents(make_folder: Make) -> None:
    folder = make_folder(DOCUMENTS, shard_tokens=5)
    assert [shard.num_tokens for shard in folder.index.shards] == [6, 5, 3]


@pytest.mark.parametrize(
    "vocab_size, dtype, itemsize", [(65_536, "uint16", 2), (65_537, "uint32", 4)]
)
def test_dtype_follows_the_vocabulary(
    make_folder: Make, vocab_size: int, dtype: str, itemsize: int
) -> None:
    folder = make_folder([[vocab_size - 1]], vocab_size=vocab_size)
    assert json.loads((folder.path / INDEX_NAME).read_text())["dtype"] == dtype
    assert (folder.path / "shard_00000.bin").stat().st_size == 2 * itemsize
    assert folder.read(0, 1).tolist() == [vocab_size - 1]


def test_file_bytes_are_little_endian(make_folder: Make) -> None:
    folder = make_folder([[0x0102]])
    assert (folder.path / "shard_00000.bin").read_bytes() == b"\x02\x01\x00\x00"
    assert (folder.path / "shard_00000.docs.bin").read_bytes() == b"\x02" + b"\x00" * 7


@pytest.mark.parametrize("start, stop", [(-1, 3), (3, 2), (0, 15)])
def test_reading_outside_the_stream_is_refused(make_folder: Make, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="14"):
        make_folder(DOCUMENTS).read(start, stop)


def test_another_process_maps_the_files_again(make_folder: Make) -> None:
    folder = make_folder(DOCUMENTS)
    folder.read(0, 3)
    sent = pickle.dumps(folder)
    assert len(sent) < 500
    assert pickle.loads(sent).read(0, 14).tolist() == STREAM


def test_fingerprint_follows_the_content_only(make_folder: Make) -> None:
    one, same = make_folder(DOCUMENTS, name="one"), make_folder(DOCUMENTS, name="same")
    other = make_folder([*DOCUMENTS[:-1], [13, 15]], name="other")
    resized = make_folder(DOCUMENTS, name="resized", vocab_size=1001)
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, resized.fingerprint}) == 3
    edit_index(same, lambda value: value.update(created_by="someone else"))
    assert open_tokens(same.path).fingerprint == one.fingerprint


def test_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such token folder; make it with `spectral-scale prep"):
        open_tokens(tmp_path / "nothing")


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a token folder is required"):
        open_tokens(tmp_path / "file")


def test_empty_folder_is_not_a_token_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no index.json"):
        open_tokens(tmp_path)


def test_interrupted_folder_is_recognised(make_folder: Make) -> None:
    folder = make_folder(DOCUMENTS).path
    (folder / INDEX_NAME).unlink()
    (folder / "INCOMPLETE").touch()
    with pytest.raises(DataError, match="interrupted; run the same prepare command again"):
        open_tokens(folder)


@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00001.docs.bin"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "remove"])
def test_wrong_sizes_are_seen_on_opening(make_folder: Make, name: str, damage: str) -> None:
    folder = make_folder(DOCUMENTS, shard_tokens=5).path
    file = folder / name
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "truncate" else data + b"\0")
    with pytest.raises(DataError, match=name) as caught:
        open_tokens(folder)
    assert "--overwrite" in str(caught.value)


def test_verify_names_the_file_of_one_flipped_bit(make_folder: Make) -> None:
    folder = make_folder(DOCUMENTS, shard_tokens=5)
    file = folder.path / "shard_00001.bin"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"shard_00001\.bin: checksum"):
        open_tokens(folder.path).verify()


def test_id_beyond_the_vocabulary_is_named_with_its_offset(make_folder: Make) -> None:
    folder = make_folder(DOCUMENTS, shard_tokens=5)
    file = folder.path / "shard_00001.bin"
    data = np.fromfile(file, dtype="<u2")
    data[2] = 1000
    data.tofile(file)
    message = r"shard_00001\.bin: token 2 \(byte 4\) is id 1000, beyond the vocabulary of 1000"
    with pytest.raises(DataError, match=message):
        open_tokens(folder.path).verify()
    with pytest.raises(DataError, match=message):
        open_tokens(folder.path).read(7, 10)
    assert open_tokens(folder.path).read(0, 8).tolist() == STREAM[:8]


@pytest.mark.parametrize("ends", [[2, 2], [4, 2], [0, 6], [4, 7]])
def test_document_ends_must_ascend_to_the_length(make_folder: Make, ends: list[int]) -> None:
    folder = make_folder(DOCUMENTS, shard_tokens=5)
    np.array(ends, dtype="<u8").tofile(folder.path / "shard_00000.docs.bin")
    with pytest.raises(DataError, match=r"shard_00000\.docs\.bin: the document ends"):
        _ = open_tokens(folder.path).document_starts


def test_verify_sees_documents_without_end_of_text(make_folder: Make) -> None:
    folder = make_folder(DOCUMENTS)
    edit_index(folder, lambda value: value.update(eos_token_id=1))
    with pytest.raises(DataError, match="document 0 does not end with the end-of-text token 1"):
        open_tokens(folder.path).verify()


def test_verify_checks_the_tokenizer(make_folder: Make) -> None:
    folder = make_folder(DOCUMENTS)
    (folder.tokenizer_path / "tokenizer.json").write_text("{} ")
    with pytest.raises(DataError, match=r"tokenizer\.json: checksum"):
        open_tokens(folder.path).verify()
    (folder.tokenizer_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        open_tokens(folder.path).verify()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.bin",
        "/etc/passwd",
        "a/../../b",
        "",
        "a\\b",
        "a\0b",
        "link.bin",
        "x/../shard_00000.bin",
    ],
)
def test_file_names_stay_inside_the_folder(make_folder: Make, tmp_path: Path, name: str) -> None:
    folder = make_folder(DOCUMENTS)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 28)
    (folder.path / "link.bin").symlink_to(tmp_path / "secret.bin")
    edit_index(folder, lambda value: value["shards"][0].update(file=name))
    with pytest.raises(DataError, match="outside the token folder"):
        open_tokens(folder.path)


def test_names_inside_the_folder_are_accepted(tmp_path: Path) -> None:
    assert confined_path(tmp_path, "part/shard.bin") == tmp_path / "part/shard.bin"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.update(num_tokens=15), "num_tokens is 15, its shards hold 14"),
        (lambda v: v.update(num_documents=3), "num_documents is 3"),
        (lambda v: v.update(dtype="uint32"), "dtype 'uint32' with vocab_size 1000"),
        (lambda v: v.update(eos_token_id=1000), "eos_token_id 1000 with vocab_size 1000"),
        (lambda v: v.update(vocab_size="many"), "vocab_size is 'many', int required"),
        (lambda v: v.update(vocab_size=True), "vocab_size is True"),
        (lambda v: v.update(shards=[]), "no shards"),
        (lambda v: v.update(shards=v["shards"] * 2), "a file is named twice"),
        (lambda v: v.pop("tokenizer_sha256"), "missing key 'tokenizer_sha256'"),
        (lambda v: v["shards"][0].pop("sha256"), "missing key 'sha256'"),
        (lambda v: v["shards"][0].update(num_tokens=-1), "-1 tokens"),
        (lambda v: v.update(sources=[{"nonsense": 1}]), "nonsense"),
        (lambda v: v.update(format="other"), '"format": "spectral_scale.tokens" is required'),
        (lambda v: v.update(format_version=2), "token format version 2, this program reads 1"),
    ],
)
def test_inconsistent_index_is_refused(
    make_folder: Make, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = make_folder(DOCUMENTS)
    edit_index(folder, change)
    with pytest.raises(DataError, match=r"index\.json: ") as caught:
        open_tokens(folder.path)
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"'])
def test_garbage_index_is_refused(make_folder: Make, data: bytes) -> None:
    folder = make_folder(DOCUMENTS).path
    (folder / INDEX_NAME).write_bytes(data)
    with pytest.raises(DataError, match=r"index\.json"):
        open_tokens(folder)


def test_index_survives_a_round_trip(make_folder: Make) -> None:
    index = make_folder(DOCUMENTS, shard_tokens=5).index
    assert parse_index(index.to_json(), where=Path("x")) == index
