"""The corpus that needs no download: Python's standard library, tokenised once and cached.

Every Python brings the sources of its own library: some eight megabytes of code and prose. A
fixed share of its files is held out for validation. The cache is keyed by what was read and
by what made it, so another Python or another version of this package makes another folder.
"""

import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from spectral_scale.data.order import hash64
from spectral_scale.data.prepare import prepare
from spectral_scale.data.token_index import FORMAT_VERSION, canonical_sha256
from spectral_scale.data.tokens import open_tokens
from spectral_scale.errors import DataError

logger = logging.getLogger(__name__)
VOCAB_SIZE = 4096
MAX_TEXT_BYTES = 8_000_000
_CORPUS_VERSION = 1
_MIN_FILES = 50
_VALIDATION_ONE_IN = 25
# Tests, generated tables and what is not part of every installation.
_EXCLUDED = (
    *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings"),
    *("pydoc_data", "distutils", "turtledemo", "tkinter", "ensurepip", "__pycache__"),
)


def embedded_corpus(cache_dir: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """The token folders of the built-in corpus, made on first use (some seconds).

    Safe to call from several processes at once: one makes it, the others wait.

    Args:
        cache_dir: where to keep it; by default `$SPECTRAL_SCALE_CACHE`, else
            `$XDG_CACHE_HOME/spectral_scale`, else `~/.cache/spectral_scale`.

    Returns:
        (training folder, validation folder), both tokenised with the same byte-level BPE.

    Raises:
        DataError: this Python has no library sources, or the cache cannot be written.
    """
    files = library_files(Path(sysconfig.get_paths()["stdlib"]))
    texts = [(name, file.read_bytes()) for name, file in files]
    folder = cache_folder(cache_dir) / f"embedded-{_key(texts)}"
    if _is_ready(folder):
        return folder / "train", folder / "valid"
    try:
        _make_locked(folder, texts)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: the cache cannot be written ({error.strerror or error}); "
            "set SPECTRAL_SCALE_CACHE to a writable folder with 100 MB free"
        ) from error
    return folder / "train", folder / "valid"


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that caches prepared built-in data; see `embedded_corpus`."""
    if cache_dir is not None:
        return Path(cache_dir)
    if own := os.environ.get("SPECTRAL_SCALE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "spectral_scale"
    return Path.home() / ".cache" / "spectral_scale"


def library_files(stdlib: Path) -> list[tuple[str, Path]]:
    """The library's source files as (relative name, path), sorted by name, at most 8 MB of them.

    Raises:
        DataError: there are no sources.
    """
    files = list(_walk(stdlib))
    if len(files) < _MIN_FILES:
        raise DataError(
            f"{stdlib}: {len(files)} source files of the Python standard library, at least "
            f"{_MIN_FILES} are required for the embedded corpus (this Python may keep them in a "
            "zip file); use a standard Python, or prepare your own text and set data.train"
        )
    chosen = []
    size = 0
    for name, file in sorted(files, key=lambda item: _name_hash(item[0])):
        size += file.stat().st_size
        if size > MAX_TEXT_BYTES:
            break
        chosen.append((name, file))
    return sorted(chosen)


def _walk(stdlib: Path) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [s for s in subfolders if s not in _EXCLUDED and "-" not in s]
        for name in names:
            if name.endswith(".py"):
                file = Path(folder) / name
                yield file.relative_to(stdlib).as_posix(), file


def _name_hash(name: str) -> int:
    return hash64(*name.encode())


def _key(texts: Sequence[tuple[str, bytes]]) -> str:
    """Hash of the corpus files and of the versions that determine their tokens."""
    contents = [(name, hashlib.sha256(text).hexdigest()) for name, text in texts]
    makers = [_CORPUS_VERSION, FORMAT_VERSION, VOCAB_SIZE, version("tokenizers")]
    return canonical_sha256([contents, makers])[:16]


def _is_ready(folder: Path) -> bool:
    try:
        open_tokens(folder / "train")
        open_tokens(folder / "valid")
    except DataError:
        return False
    return True


def _make_locked(folder: Path, texts: Sequence[tuple[str, bytes]]) -> None:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "embedded.lock"):
        if not _is_ready(folder):
            logger.info("preparing the embedded corpus in %s (once)", folder)
            _make(folder, texts)


def _make(folder: Path, texts: Sequence[tuple[str, bytes]]) -> None:
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for name, data in texts:
        part = "valid" if _name_hash(name) % _VALIDATION_ONE_IN == 0 else "train"
        # What is not UTF-8 (a few files name another encoding) or empty is left out.
        with suppress(UnicodeDecodeError):
            if text := data.decode("utf-8").strip():
                parts[part].append(json.dumps({"text": text}) + "\n")
    with TemporaryDirectory(dir=folder) as scratch:
        for part, lines in parts.items():
            (Path(scratch) / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        train, valid = (Path(scratch) / f"{part}.jsonl" for part in parts)
        prepare([train], folder / "train", train_bpe=VOCAB_SIZE, overwrite=True)
        prepare([valid], folder / "valid", tokenizer=folder / "train", overwrite=True)
