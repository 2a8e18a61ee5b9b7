"""The kinds of input file, plain or compressed, and the documents in them."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from spectral_scale.data.records import Record
from spectral_scale.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
"""A longer text file or line is refused rather than read into memory."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_READ_BYTES = 1 << 20


def suffix_of(path: Path) -> str:
    """The key of the kind of a file (`.jsonl`, `.txt.gz`, ...); empty for an unknown kind."""
    return next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), "")


def read_file(path: Path, suffix: str, text_field: str) -> Iterator[Record]:
    """The documents of a file, in order.

    Args:
        path: a regular file.
        suffix: from `suffix_of`.
        text_field: the column of a table that holds the text.

    Raises:
        DataError: the file is unreadable or damaged as a whole, or a document is too long.
    """
    try:
        yield from _READERS[suffix](path, text_field)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); replace the file") from error


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed as its name says."""
    compression = path.suffix.lower()
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if compression == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if compression not in (".zst", ".lz4"):
        return path.open("rb")
    import pyarrow as pa

    stream = pa.CompressedInputStream(
        pa.OSFile(str(path)), "zstd" if compression == ".zst" else "lz4"
    )
    return cast(BinaryIO, io.BufferedReader(stream, _READ_BYTES))


def _read_text(path: Path, text_field: str) -> Iterator[Record]:
    with _open(path) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path}: more than {MAX_DOCUMENT_BYTES} bytes, but a text file is one document of at "
            "most that; cut it into several files or into JSON lines"
        )
    content = data.removeprefix(codecs.BOM_UTF8)
    yield Record(str(path), len(data) - len(content), content, False)


def _read_lines(path: Path, text_field: str) -> Iterator[Record]:
    offset = 0
    number = 0
    with _open(path) as stream:
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
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for data in column.to_pylist():
                    row += 1
                    text = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
                    yield Record(f"{path}: row {row}", 0, text, False)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a sound Parquet file ({error}); replace the file") from error


def _check_column(path: Path, schema: object, text_field: str) -> None:
    import pyarrow as pa

    names: list[str] = schema.names  # type: ignore[attr-defined]
    if text_field not in names:
        raise DataError(
            f"{path}: no column {text_field!r}, it has: {', '.join(names)}; name one with "
            "--text-field"
        )
    if names.count(text_field) > 1:
        raise DataError(
            f"{path}: {names.count(text_field)} columns are named {text_field!r} (columns "
            f"{', '.join(str(i) for i, name in enumerate(names) if name == text_field)}), one is "
            "required; rename the others, or name another column with --text-field"
        )
    kind = schema.field(text_field).type  # type: ignore[attr-defined]
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    )
    if not any(test(value) for test in tests):
        raise DataError(f"{path}: the column {text_field!r} is of type {kind}, text is required")


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".parquet": _read_parquet,
    **{f".txt{compression}": _read_text for compression in COMPRESSIONS},
    **{f".jsonl{compression}": _read_lines for compression in COMPRESSIONS},
}
KNOWN = f".txt, .jsonl (both plain or compressed: {', '.join(COMPRESSIONS)}) or .parquet"
"""The kinds of file, for messages and help."""
