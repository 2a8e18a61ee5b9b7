"""The built-in corpus: made once, the same for everyone, held out by file."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectral_scale.data import embedded
from spectral_scale.data.embedded import cache_folder, embedded_corpus, library_files
from spectral_scale.data.tokens import open_tokens
from spectral_scale.errors import DataError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stand-in for the standard library."""
    stdlib = tmp_path_factory.mktemp("lib")
    for number in range(200):
        folder = stdlib / f"package{number % 3}"
        folder.mkdir(exist_ok=True)
        body = f"def function_{number}(value):\n    return value * {number}\n" * 5
        (folder / f"module{number}.py").write_text(body)
    for name in ("test", "site-packages", "config-3.11"):
        (stdlib / name).mkdir()
        (stdlib / name / "excluded.py").write_text("excluded_marker")
    (stdlib / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (stdlib / "empty.py").write_bytes(b"")
    return stdlib


@pytest.fixture
def small(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(embedded, "VOCAB_SIZE", 300)
    yield library


def test_two_folders_with_one_tokenizer(small: Path, tmp_path: Path) -> None:
    train, valid = (open_tokens(folder) for folder in embedded_corpus(tmp_path))
    train.verify()
    valid.verify()
    assert train.tokenizer_sha256 == valid.tokenizer_sha256
    assert train.vocab_size == valid.vocab_size == 300
    assert train.index.num_documents + valid.index.num_documents == 200
    assert valid.index.num_documents >= 3
    left = {p.name for p in train.path.parent.iterdir()}
    assert left <= {"train", "valid", "embedded.lock"}


def test_made_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = embedded_corpus(tmp_path)
    monkeypatch.setattr(embedded, "prepare", None)
    assert embedded_corpus(tmp_path) == folders


def test_same_everywhere(small: Path, tmp_path: Path) -> None:
    one = [open_tokens(f) for f in embedded_corpus(tmp_path / "one")]
    two = [open_tokens(f) for f in embedded_corpus(tmp_path / "two")]
    assert [f.fingerprint for f in one] == [f.fingerprint for f in two]
    assert [f.path.parent.name for f in one] == [f.path.parent.name for f in two]


def test_other_sources_make_another_folder(small: Path, tmp_path: Path) -> None:
    first = embedded_corpus(tmp_path)[0]
    changed = small / "package0/module0.py"
    text = changed.read_text()
    try:
        changed.write_text(text + "changed = True\n")
        assert embedded_corpus(tmp_path)[0] != first
    finally:
        changed.write_text(text)
    assert embedded_corpus(tmp_path)[0] == first


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_damaged_or_half_cache_is_repaired(small: Path, tmp_path: Path, part: str) -> None:
    train, valid = embedded_corpus(tmp_path)
    before = [open_tokens(f).fingerprint for f in (train, valid)]
    (tmp_path / train.parent.name / part / "shard_00000.bin").write_bytes(b"")
    assert [open_tokens(f).fingerprint for f in embedded_corpus(tmp_path)] == before
    (tmp_path / train.parent.name / part / "index.json").unlink()
    (tmp_path / train.parent.name / part / "INCOMPLETE").touch()
    assert [open_tokens(f).fingerprint for f in embedded_corpus(tmp_path)] == before


def test_processes_at_once_make_it_together(library: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from spectral_scale.data import embedded\n"
        f"embedded.sysconfig.get_paths = lambda: {{'stdlib': {str(library)!r}}}\n"
        "embedded.VOCAB_SIZE = 300\n"
        "from spectral_scale.data.tokens import open_tokens\n"
        "print([open_tokens(f).fingerprint for f in embedded.embedded_corpus(sys.argv[1])])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] != ""


def test_excluded_files_are_not_read(library: Path) -> None:
    names = [name for name, _ in library_files(library)]
    assert len(names) == 202 and names == sorted(names)
    assert not any(name.startswith(("test/", "site-packages/", "config-")) for name in names)


def test_large_library_is_capped_evenly(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MAX_TEXT_BYTES", 20_000)
    files = library_files(library)
    assert 15_000 < sum(file.stat().st_size for _, file in files) <= 20_000
    assert {name.split("/")[0] for name, _ in files} >= {"package0", "package1", "package2"}


def test_library_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="0 source files.*prepare your own text"):
        embedded_corpus(tmp_path / "cache")


def test_unwritable_cache(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written.*SPECTRAL_SCALE_CACHE"):
        embedded_corpus(tmp_path / "file")


def test_cache_folder_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SPECTRAL_SCALE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/spectral_scale"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/spectral_scale")
    monkeypatch.setenv("SPECTRAL_SCALE_CACHE", "/own")
    assert cache_folder() == Path("/own")
    assert cache_folder("given") == Path("given")


def test_this_python_has_a_library() -> None:
    import sysconfig

    files = library_files(Path(sysconfig.get_paths()["stdlib"]))
    assert sum(file.stat().st_size for _, file in files) > 1_000_000
    assert json.dumps([name for name, _ in files])
