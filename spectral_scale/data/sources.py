"""From what the user names to documents: files, folders of files, and datasets.

Knows the formats, not what becomes of the text.
"""

import codecs
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from spectral_scale.data import huggingface
from spectral_scale.data.records import Record
from spectral_scale.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
"""A longer text file or line is refused rather than read into memory."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file or dataset to read."""

    name: str
    """Relative to what the user gave, so that the same data has the same name elsewhere."""
    path: Path | None
    """The file; None for a dataset."""
    suffix: str
    """Key of the format table; `hf:` for a dataset."""


def find_sources(inputs: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files and datasets that the inputs stand for, in the order given, folders sorted.

    Raises:
        DataError: an input that does not exist, has no known format, or is named twice.
    """
    sources = [source for item in inputs for source in _expand(os.fspath(item))]
    if not sources:
        raise DataError(f"no input files given; give {_KNOWN}, folders of these, or hf:NAME")
    seen: set[str] = set()
    for source in sources:
        key = str(source.path.resolve()) if source.path else source.name
        if key in seen:
            raise DataError(f"{source.path or source.name}: given twice; name each input once")
        seen.add(key)
    return sources


def read_records(source: Source, *, text_field: str, streaming: bool = False) -> Iterator[Record]:
    """The documents of a source, in order.

    Args:
        source: from `find_sources`.
        text_field: the column of a table that holds the text.
        streaming: read a dataset without downloading it first.

    Raises:
        DataError: the file is unreadable or damaged as a whole, or a document is too long.
    """
    if source.path is None:
        return huggingface.read_dataset(source.name, text_field=text_field, streaming=streaming)
    return _read_file(source.path, source.suffix, text_field)


def _expand(item: str) -> Iterator[Source]:
    if item.startswith(huggingface.PREFIX):
        huggingface.parse_spec(item)
        yield Source(name=item, path=None, suffix=huggingface.PREFIX)
        return
    path = Path(item)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _suffix(p) and _is_visible(p, path))
        if not found:
            raise DataError(f"{path}: no {_KNOWN} files in this folder")
        base = path.resolve().parent
        for file in found:
            name = (path.resolve() / file.relative_to(path)).relative_to(base).as_posix()
            yield Source(name=name, path=file, suffix=_suffix(file))
        return
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not _suffix(path):
        raise DataError(f"{path}: unknown kind of file; required is {_KNOWN}")
    yield Source(name=path.name, path=path, suffix=_suffix(path))


def _suffix(path: Path) -> str:
    return next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), "")


def _is_visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)


def _read_file(path: Path, suffix: str, text_field: str) -> Iterator[Record]:
    try:
        yield from _READERS[suffix](path, text_field)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); replace the file") from error


def _read_text(path: Path, text_field: str) -> Iterator[Record]:
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path}: {size} bytes, but a text file is one document of at most "
            f"{MAX_DOCUMENT_BYTES}; cut it into several files or into JSON lines"
        )
    data = path.read_bytes()
    content = data.removeprefix(codecs.BOM_UTF8)
    yield Record(str(path), len(data) - len(content), content, False)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Record]:
    with path.open("rb") as stream:
        yield from _read_lines(path, stream)


def _read_jsonl_gz(path: Path, text_field: str) -> Iterator[Record]:
    with gzip.open(path, "rb") as stream:
        yield from _read_lines(path, stream)  # type: ignore[arg-type]


def _read_lines(path: Path, stream: BinaryIO) -> Iterator[Record]:
    offset = 0
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{path}:{number}: a line of more than {MAX_DOCUMENT_BYTES} bytes (from byte "
                f"{offset}); is this a file of JSON lines?"
            )
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.isspace():
            start = offset + len(line) - len(content)
            yield Record(f"{path}:{number}", start, content, True)
        offset += len(line)


def _read_parquet(path: Path, text_field: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            _check_column(path, table.schema_arrow, text_field)
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                    row += 1
                    yield Record(f"{path}: row {row}", 0, data, False)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a sound Parquet file ({error}); replace the file") from error


def _check_column(path: Path, schema: object, text_field: str) -> None:
    import pyarrow as pa

    names = schema.names  # type: ignore[attr-defined]
    if text_field not in names:
        raise DataError(
            f"{path}: no column {text_field!r}, it has: {', '.join(names)}; name one with "
            "--text-field"
        )
    kind = schema.field(text_field).type  # type: ignore[attr-defined]
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    if not any(test(kind) for test in (*tests, pa.types.is_large_binary)):
        raise DataError(f"{path}: the column {text_field!r} is of type {kind}, text is required")


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".parquet": _read_parquet,
}
_KNOWN = ", ".join(_READERS)
