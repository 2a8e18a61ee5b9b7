"""Inputs: what a name stands for, and the documents that come out."""

import bz2
import gzip
import json
import lzma
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spectral_scale.data import file_formats, huggingface
from spectral_scale.data.records import Record
from spectral_scale.data.sources import find_sources, read_records
from spectral_scale.errors import DataError

LINES = b'{"text": "one"}\n\n   \n{"text": "two"}\r\n{"text": "three"}'


def documents(path: Path | str, **options: object) -> list[Record]:
    settings: dict[str, object] = {"text_field": "text", **options}
    return [r for s in find_sources([path]) for r in read_records(s, **settings)]  # type: ignore


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    assert documents(tmp_path / "a.txt") == [
        Record(str(tmp_path / "a.txt"), 3, b"one\n\ntwo\n", False)
    ]


def compressed(data: bytes, name: str) -> bytes:
    """Data as the suffix of `name` says; by pyarrow what the standard library does not have."""
    ending = name.lower().rpartition(".")[2]
    if ending in ("zst", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, {"zst": "zstd", "lz4": "lz4"}[ending]) as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    modules = {"gz": gzip, "bz2": bz2, "xz": lzma}
    return modules[ending].compress(data) if ending in modules else data


ENDINGS = [".gz", ".bz2", ".xz", ".zst", ".lz4"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_compressed_text_is_one_document(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.txt{ending}").write_bytes(compressed(b"one\n\ntwo\n", ending))
    assert [r.data for r in documents(tmp_path / f"a.txt{ending}")] == [b"one\n\ntwo\n"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_compressed_files_may_have_several_frames_and_are_read_to_the_end(
    tmp_path: Path, ending: str
) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(60_000))
    data = compressed(lines, ending)
    (tmp_path / f"a.jsonl{ending}").write_bytes(data + compressed(b'{"text": "last"}\n', ending))
    assert len(documents(tmp_path / f"a.jsonl{ending}")) == 60_001
    (tmp_path / f"a.jsonl{ending}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"a.jsonl{ending}: cannot be read .*; replace the file"):
        documents(tmp_path / f"a.jsonl{ending}")


@pytest.mark.parametrize(
    "name", ["a.jsonl", "A.JSONL", *(f"a.jsonl{ending}" for ending in ENDINGS)]
)
def test_lines_keep_their_number_and_offset(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(compressed(LINES, name))
    found = documents(path)
    assert [(r.where.rsplit(":", 1)[1], r.offset) for r in found] == [
        ("1", 0),
        ("4", 21),
        ("5", 38),
    ]
    assert [json.loads(r.data or b"")["text"] for r in found] == ["one", "two", "three"]


def test_byte_order_mark_of_a_line_file_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    assert [r.offset for r in documents(tmp_path / "a.jsonl")] == [3, 24, 41]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(pa.binary(), pa.large_binary(), pa.binary_view()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())),
    ],
    ids=str,
)
def test_parquet_rows(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["é".encode() if "binary" in str(kind) else "é", None]
    table = pa.table({"id": [1, 2], "body": pa.array(values, type=kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = documents(tmp_path / "a.parquet", text_field="body")
    assert [r.data for r in found] == ["é".encode(), None]
    assert found[1].where.endswith("a.parquet: row 2")


def test_parquet_without_a_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "n": [2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text', it has: id, n; .*--text-field"):
        documents(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column 'n' is of type int64, text is required"):
        documents(tmp_path / "a.parquet", text_field="n")


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    text = pa.array(["one", "two"])
    table = pa.Table.from_arrays([text, text, text], names=["text", "body", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    message = r"a\.parquet: 2 columns are named 'text' \(columns 0, 2\), one is required"
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "a.parquet")
    assert [r.data for r in documents(tmp_path / "a.parquet", text_field="body")] == [
        b"one",
        b"two",
    ]


def test_inputs_that_are_no_regular_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl: a named pipe, but a regular file is required"):
        find_sources([folder / "x.jsonl"])
    with pytest.raises(DataError, match=r"x\.jsonl: a named pipe"):
        find_sources([folder])
    (folder / "x.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        server.bind("y.txt")
        with pytest.raises(DataError, match="a socket, but a regular file is required"):
            find_sources(["y.txt"])
    (tmp_path / "null.txt").symlink_to("/dev/null")
    with pytest.raises(DataError, match="a device, but a regular file is required"):
        find_sources([tmp_path / "null.txt"])


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    data.mkdir()
    (data / "a.txt").write_text("x")
    (elsewhere / "deep" / "b.txt").write_text("y")
    (data / "more").symlink_to("../elsewhere")
    assert [s.name for s in find_sources([data])] == ["data/a.txt", "data/more/deep/b.txt"]
    (elsewhere / "deep" / "up").symlink_to(data)
    with pytest.raises(DataError, match="a link to a folder above it"):
        find_sources([data])
    (elsewhere / "deep" / "up").unlink()
    (data / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(DataError, match=r"gone\.txt: a link to nowhere\.txt, which is not there"):
        find_sources([data])


def test_files_of_an_unknown_kind_are_refused_or_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "README.md", *(f"part{number}.csv" for number in range(7))):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        DataError, match=r"7 files of an unknown kind: part0\.csv, .* and 2 more; .*--on-unknown"
    ):
        find_sources([tmp_path])
    assert len(find_sources([tmp_path], on_unknown="skip")) == 1
    assert "7 files of an unknown kind: part0.csv" in caplog.text
    with pytest.raises(DataError, match=r"part0\.csv: unknown kind of file"):
        find_sources([tmp_path / "part0.csv"], on_unknown="skip")


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.parquet", b"PAR1 not really"),
        ("a.parquet", b""),
        ("a.jsonl.gz", b"not gzip"),
        ("a.jsonl.gz", gzip.compress(LINES * 100)[:-20]),
    ],
    ids=["no magic bytes", "empty", "not gzip", "cut short"],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: .*replace the file"):
        documents(tmp_path / name)


def test_folders_are_sorted_and_named_from_the_folder(tmp_path: Path) -> None:
    for name in ("z.txt", "b/y.jsonl", "b/a.txt", "notes.md", ".hidden/x.txt", ".x.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("x")
    found = find_sources([tmp_path / "texts"])
    assert [s.name for s in found] == ["texts/b/a.txt", "texts/b/y.jsonl", "texts/z.txt"]


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "no input files given"),
        (["nothing.txt"], "nothing.txt: no such file or folder"),
        (["notes.md"], r"notes\.md: unknown kind of file; required is \.txt, \.jsonl"),
        (["empty"], r"empty: no \.txt.* files in this folder"),
        (["a.txt", "./a.txt"], "a.txt: given twice"),
        (["a.txt", "."], "given twice"),
        (["hf:"], "required is hf:NAME"),
        (["hf:a:b:c:d"], "required is hf:NAME"),
        (["hf:a", "hf:a"], "given twice"),
    ],
)
def test_impossible_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        find_sources(inputs)


def test_a_document_too_long_for_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "MAX_DOCUMENT_BYTES", 20)
    (tmp_path / "a.txt").write_text("x" * 21)
    (tmp_path / "b.jsonl").write_text("x" * 19 + "\n" + "x" * 20 + "\n")
    with pytest.raises(DataError, match="more than 20 bytes, but a text file is one document"):
        documents(tmp_path / "a.txt")
    with pytest.raises(
        DataError, match=r"b\.jsonl:2: a line of more than 20 bytes \(from byte 20\)"
    ):
        documents(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "spec, parsed",
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:name:conf", ("name", "conf", "train")),
        ("hf:name:conf:test", ("name", "conf", "test")),
        ("hf:name::validation", ("name", None, "validation")),
    ],
)
def test_dataset_names(spec: str, parsed: tuple[str, str | None, str]) -> None:
    assert huggingface.parse_spec(spec) == parsed


@pytest.mark.parametrize("streaming", [True, False])
def test_dataset_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "local").mkdir()
    lines = [{"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "thrée", "n": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "local/train.jsonl").write_text(text)
    found = documents(f"hf:{tmp_path / 'local'}", streaming=streaming)
    assert [r.data for r in found] == [b"one", None, "thrée".encode()]
    assert found[2].where.endswith("local: row 3")
    with pytest.raises(DataError, match="no column 'body', it has: text, n"):
        documents(f"hf:{tmp_path / 'local'}", streaming=streaming, text_field="body")


def test_offline_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"hf:some/data: .*no route.*HF_HOME.*Parquet"):
        documents("hf:some/data")


def test_datasets_are_never_loaded_with_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[dict[str, object]] = []

    def load(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append(kwargs)
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents("hf:some/data")
    assert calls == [{"split": "train", "streaming": False}]
