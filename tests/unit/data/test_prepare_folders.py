"""prepare: the whole job, what it refuses, and what is left when it is cut short."""

import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spectral_scale.data import prepare as prepare_module
from spectral_scale.data import prepare_job
from spectral_scale.data.prepare import PrepareResult, prepare
from spectral_scale.data.tokenizer import END_OF_TEXT
from spectral_scale.data.tokens import TokenFolder, open_tokens
from spectral_scale.errors import ConfigError, DataError

TEXTS = [
    f"Document {i}: the weights {i % 7} of a matrix {i * i}.\n" * (1 + i % 5) for i in range(40)
]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "lines.jsonl", TEXTS)


def run(inputs: Path | list[Path], output: Path, **options: Any) -> PrepareResult:
    settings = {"train_bpe": 300, "progress": False} | options
    if "tokenizer" in options:
        del settings["train_bpe"]
    return prepare(inputs if isinstance(inputs, list) else [inputs], output, **settings)


def decoded(folder: TokenFolder) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder.tokenizer_path / "tokenizer.json"))
    bounds = [*folder.document_starts.tolist(), folder.num_tokens]
    texts = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        ids = folder.read(start, stop)
        assert ids[-1] == folder.eos_token_id
        assert folder.eos_token_id not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_tokens_decode_to_the_documents(lines: Path, tmp_path: Path) -> None:
    result = run(lines, tmp_path / "out")
    (folder,) = result.folders
    assert not result.already_done
    assert decoded(folder) == TEXTS
    folder.verify()
    names = {"index.json", "shard_00000.bin", "shard_00000.docs.bin"}
    tokenizer = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert set(contents(tmp_path / "out")) == names | tokenizer


def test_the_same_shard_under_two_names_is_said(
    lines: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(lines.read_bytes())
    other = write_lines(tmp_path / "other.jsonl", ["something else"])
    run([lines, other, copy], tmp_path / "out")
    assert f"{lines} and {copy} have the same content" in caplog.text
    assert caplog.text.count("have the same content") == 1


def test_every_format_gives_the_same_tokens(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / f"texts/{number:03d}.txt").write_text(text)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "table.parquet")
    (first,) = run(lines, tmp_path / "first").folders
    for name in ("texts", "lines.jsonl.gz", "table.parquet"):
        (other,) = run(tmp_path / name, tmp_path / f"out_{name}", tokenizer=first.path).folders
        assert other.fingerprint == first.fingerprint


@pytest.mark.parametrize("split", [0.0, 0.3])
def test_bytes_do_not_depend_on_workers(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: float
) -> None:
    monkeypatch.setattr("spectral_scale.data.encode._BATCH_RECORDS", 3)
    options = {"shard_tokens": 200, "split_validation": split}
    run(lines, tmp_path / "one", workers=1, **options)
    run(lines, tmp_path / "two", workers=2, **options)
    one = contents(tmp_path / "one")
    assert len(one) > 8
    assert one == contents(tmp_path / "two")


def test_split_takes_whole_documents_once(lines: Path, tmp_path: Path) -> None:
    train, valid = run(lines, tmp_path / "out", split_validation=0.3).folders
    assert (train.path, valid.path) == (tmp_path / "out/train", tmp_path / "out/valid")
    with pytest.raises(DataError, match="holds the token folders train, valid; name one of them"):
        open_tokens(tmp_path / "out")
    assert train.tokenizer_sha256 == valid.tokenizer_sha256
    assert sorted(decoded(train) + decoded(valid)) == sorted(TEXTS)
    assert 4 <= valid.index.num_documents <= 20
    _, other = run(lines, tmp_path / "other", split_validation=0.3, seed=1).folders
    assert decoded(other) != decoded(valid)


def test_held_out_documents_do_not_train_the_tokenizer(lines: Path, tmp_path: Path) -> None:
    train, _ = run(lines, tmp_path / "out", split_validation=0.3).folders
    alone = write_lines(tmp_path / "alone.jsonl", decoded(train))
    (again,) = run(alone, tmp_path / "again").folders
    assert again.tokenizer_sha256 == train.tokenizer_sha256
    (whole,) = run(lines, tmp_path / "whole").folders
    assert whole.tokenizer_sha256 != train.tokenizer_sha256


def test_split_that_leaves_a_part_empty(lines: Path, tmp_path: Path) -> None:
    message = "--split-validation 1e-06 leaves no document for 'valid'"
    with pytest.raises(DataError, match=message):
        run(lines, tmp_path / "out", split_validation=1e-6)


def test_tokenizer_sample_is_capped_and_fixed(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = prepare_job.train_bpe_tokenizer

    def spy(texts: Any, **options: Any) -> Any:
        seen[:] = list(texts)
        return train(iter(seen), **options)

    monkeypatch.setattr(prepare_job, "train_bpe_tokenizer", spy)
    run(lines, tmp_path / "whole")
    assert seen == TEXTS
    monkeypatch.setattr(prepare_job, "BPE_SAMPLE_BYTES", 1500)
    run(lines, tmp_path / "one")
    sample = list(seen)
    assert 500 < sum(map(len, sample)) < 1800
    assert TEXTS.index(sample[-1]) > 20  # spread over the input, not its head
    run(lines, tmp_path / "two")
    assert seen == sample


def test_same_command_again_is_done(lines: Path, tmp_path: Path) -> None:
    run(lines, tmp_path / "out", split_validation=0.3)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*") if p.is_file()}
    result = run(lines, tmp_path / "out", split_validation=0.3, workers=2)
    assert result.already_done and len(result.folders) == 2
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.name != ".lock")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"train_bpe": 301}, "tokenizer"),
        ({"shard_tokens": 50}, "shard_tokens"),
        ({"on_bad": "skip"}, "on_bad"),
        ({"inputs": True}, "sources"),
    ],
)
def test_another_request_is_refused_unless_overwritten(
    lines: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(lines, tmp_path / "out")
    before = contents(tmp_path / "out")
    if change.pop("inputs", False):
        write_lines(lines, TEXTS[:-1])
    with pytest.raises(DataError, match=f"already prepared from a different {named}.*--overwrite"):
        run(lines, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before
    run(lines, tmp_path / "out", **change, overwrite=True)
    run(lines, tmp_path / "fresh", **change)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_overwriting_leaves_no_old_shard(lines: Path, tmp_path: Path) -> None:
    run(lines, tmp_path / "out", shard_tokens=50)
    run(lines, tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").glob("shard_*"))) == 2


def test_damaged_folder_is_refused_then_replaced(lines: Path, tmp_path: Path) -> None:
    run(lines, tmp_path / "out")
    (tmp_path / "out/shard_00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard_00000\.bin: 0 bytes.*--overwrite"):
        run(lines, tmp_path / "out")
    run(lines, tmp_path / "out", overwrite=True).folders[0].verify()


@pytest.mark.parametrize("split", [0.0, 0.3])
@pytest.mark.parametrize("name", ["notes.md", "tokenizer/tokenizer.json", "index.json"])
def test_foreign_folders_are_left_alone(
    lines: Path, tmp_path: Path, name: str, split: float
) -> None:
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(DataError, match="not empty .* and not a token folder"):
        run(lines, tmp_path / "mine", overwrite=True, split_validation=split)
    assert contents(tmp_path / "mine") == {name: b"{}"}
    assert not (tmp_path / "mine/.lock").exists()


def test_output_must_be_a_folder(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a file, the output must be a folder"):
        run(lines, lines)
    with pytest.raises(DataError, match="cannot be written"):
        run(lines, lines / "below")


def test_two_at_once_are_refused(lines: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        with pytest.raises(DataError, match="another process is preparing it"):
            run(lines, tmp_path / "out")
    run(lines, tmp_path / "out")


def test_tokenizer_inside_the_output_is_refused(lines: Path, tmp_path: Path) -> None:
    run(lines, tmp_path / "out")
    with pytest.raises(ConfigError, match="lies in the output folder"):
        run(lines, tmp_path / "out", tokenizer=tmp_path / "out", overwrite=True)
    open_tokens(tmp_path / "out")


BAD_LINES = [
    (b'{"text": "\xff"}', "invalid_utf8", r"lines\.jsonl:3: invalid UTF-8 at byte 42"),
    (b'{"text": ', "invalid_json", r"lines\.jsonl:3: invalid JSON at byte 42"),
    (b'{"body": "a"}', "missing_text", r"lines\.jsonl:3: the field 'text' is missing"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("line, reason, message", BAD_LINES)
def test_bad_documents_stop_or_are_counted(
    tmp_path: Path, line: bytes, reason: str, message: str, workers: int
) -> None:
    good = [b'{"text": "alpha"}', b'{"text": " "}', b'{"text": "beta"}']
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join([good[0], good[1], line, good[2]]))
    first = tmp_path / "lines.jsonl"
    tokenizer = run(write_lines(tmp_path / "t.jsonl", TEXTS), tmp_path / "t").folders[0].path
    options = {"tokenizer": tokenizer, "workers": workers}
    with pytest.raises(DataError, match=f"{message}.*; fix the input, or .*--on-bad skip"):
        run(first, tmp_path / "out", **options)
    with pytest.raises(DataError, match="interrupted; run the same prepare command"):
        open_tokens(tmp_path / "out")
    (folder,) = run(first, tmp_path / "out", **options, on_bad="skip").folders
    assert decoded(folder) == ["alpha", "beta"]
    assert folder.index.skipped == {"empty_document": 1, reason: 1}


@pytest.mark.parametrize("line, reason, message", BAD_LINES)
def test_bad_documents_while_training_the_tokenizer(
    tmp_path: Path, line: bytes, reason: str, message: str
) -> None:
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "alpha"}\n{"text": " "}\n' + line)
    with pytest.raises(DataError, match=r"lines\.jsonl:3: "):
        run(tmp_path / "lines.jsonl", tmp_path / "out")
    (folder,) = run(tmp_path / "lines.jsonl", tmp_path / "out", on_bad="skip").folders
    assert folder.index.skipped == {"empty_document": 1, reason: 1}


def test_first_bad_document_is_named_whatever_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral_scale.data.encode._BATCH_RECORDS", 1)
    tokenizer = run(write_lines(tmp_path / "t.jsonl", TEXTS), tmp_path / "t").folders[0].path
    rows = [b'{"text": "' + b"long " * 2000 + b'"}'] * 3 + [b"{", b"[", b"x"]
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(rows))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"lines\.jsonl:4: "):
            run(tmp_path / "lines.jsonl", tmp_path / "out", tokenizer=tokenizer, workers=workers)


def test_empty_corpora_are_errors(tmp_path: Path, lines: Path) -> None:
    tokenizer = run(lines, tmp_path / "t").folders[0].path
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.txt: no usable document .*\(1 empty_document\)"):
        run(tmp_path / "empty.txt", tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="no usable document in the inputs"):
        run(tmp_path / "empty.jsonl", tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()


def test_text_that_spells_the_end_of_text_token(tmp_path: Path) -> None:
    tricky = [f"a {END_OF_TEXT} b", END_OF_TEXT]
    path = write_lines(tmp_path / "lines.jsonl", tricky)
    assert decoded(run(path, tmp_path / "out").folders[0]) == tricky


def test_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path, lines: Path) -> None:
    (folder,) = run(lines, tmp_path / "small").folders
    file = tmp_path / "wide/tokenizer.json"
    file.parent.mkdir()
    value = json.loads((folder.tokenizer_path / "tokenizer.json").read_text())
    vocab = value["model"]["vocab"]
    vocab.update({f"unused{i}": i for i in range(len(vocab), 70_000)})
    file.write_text(json.dumps(value))
    (file.parent / "tokenizer_config.json").write_bytes(
        (folder.tokenizer_path / "tokenizer_config.json").read_bytes()
    )
    (wide,) = run(lines, tmp_path / "out", tokenizer=file.parent).folders
    assert wide.vocab_size == 70_000
    assert (wide.path / "shard_00000.bin").stat().st_size == 4 * wide.num_tokens
    assert np.array_equal(wide.read(0, wide.num_tokens), folder.read(0, folder.num_tokens))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_bpe": None}, "exactly one of --tokenizer FOLDER and --train-bpe N"),
        ({"train_bpe": 256}, "--train-bpe 256: at least 257"),
        ({"on_bad": "ignore"}, "--on-bad 'ignore'"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"split_validation": 1.0}, "--split-validation 1.0"),
        ({"split_validation": -0.1}, "--split-validation -0.1"),
    ],
)
def test_impossible_settings(
    lines: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(lines, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_input_that_changes_while_it_is_read(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = prepare_module.make_tokenizer

    def and_change(job: Any) -> Any:
        facts = make(job)
        write_lines(lines, [*TEXTS, "one more"])
        return facts

    monkeypatch.setattr(prepare_module, "make_tokenizer", and_change)
    with pytest.raises(DataError, match="changed while it was read"):
        run(lines, tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()


def in_process(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    head = "import os, sys\nfrom spectral_scale.data import prepare as module, prepare_job as job\n"
    body = textwrap.dedent(code)
    call = "module.prepare([sys.argv[1]], sys.argv[2], train_bpe=300)\n"
    return subprocess.run(
        [sys.executable, "-c", head + body + call, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )


@pytest.mark.parametrize(
    "killed_at",
    ["job.train_bpe_tokenizer", "job.TokenWriter.append", "module.write_index"],
)
@pytest.mark.parametrize("again", [False, True])
def test_killed_run_leaves_no_index_and_is_redone(
    lines: Path, tmp_path: Path, killed_at: str, again: bool
) -> None:
    """Also when the killed run was replacing a finished folder."""
    if again:
        run(lines, tmp_path / "out", train_bpe=310)
    overwrite = (
        "import functools\nmodule.prepare = functools.partial(module.prepare, overwrite=True)\n"
    )
    killed = in_process(
        f"{overwrite}{killed_at} = lambda *a, **k: os._exit(9)\n", lines, tmp_path / "out"
    )
    assert killed.returncode == 9, killed.stderr
    assert not (tmp_path / "out/index.json").exists()
    with pytest.raises(DataError, match="interrupted; run the same prepare command again"):
        open_tokens(tmp_path / "out")
    run(lines, tmp_path / "out")
    run(lines, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_full_disk_is_named_and_leaves_no_index(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.jsonl", TEXTS * 60)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    failed = in_process(limit, path, tmp_path / "out")
    assert "DataError" in failed.stderr and "cannot be written (File too large)" in failed.stderr
    assert (tmp_path / "out/tokenizer/tokenizer.json").exists()
    with pytest.raises(DataError, match="interrupted"):
        open_tokens(tmp_path / "out")
    run(path, tmp_path / "out").folders[0].verify()
