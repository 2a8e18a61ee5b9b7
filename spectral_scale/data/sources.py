"""From what the user names to inputs: files, folders of files, and datasets.

Nothing is left out of a folder in silence: links are followed, and what cannot be read is an error
unless it may be skipped.
"""

import fnmatch
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spectral_scale.data import huggingface
from spectral_scale.data.file_formats import KNOWN, read_file, suffix_of
from spectral_scale.data.records import Record
from spectral_scale.errors import DataError

logger = logging.getLogger(__name__)

OnUnknown = Literal["error", "skip"]
COMPANIONS = (
    *("README*", "LICENSE*", "LICENCE*", "NOTICE*", "CITATION*", "*.md", "_SUCCESS", "_metadata"),
    *("_common_metadata", "*.crc", "*.md5", "*.sha256", "*SUMS*", "dataset_info*.json"),
)
"""Names of files that lie beside data sets and hold no documents."""
_NAMED = 5
"""Passed-over files that a message names; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file or dataset to read."""

    name: str
    """Relative to what the user gave, so that the same data has the same name elsewhere."""
    path: Path | None
    """The file; None for a dataset."""
    suffix: str
    """Kind of the file, from `suffix_of`; `hf:` for a dataset."""


def find_sources(
    inputs: Sequence[str | os.PathLike[str]], *, on_unknown: OnUnknown = "error"
) -> list[Source]:
    """The files and datasets that the inputs stand for, in the order given, folders sorted.

    Args:
        inputs: files, folders and datasets.
        on_unknown: a file of an unknown kind in a folder: refuse it (`error`), or pass over it
            with a warning (`skip`). Hidden files and companions of data sets such as README.md
            are always passed over.

    Raises:
        DataError: an input that does not exist, has no known format, is no regular file, or is
            named twice.
    """
    sources = [source for item in inputs for source in _expand(os.fspath(item), on_unknown)]
    if not sources:
        raise DataError(f"no input files given; give {KNOWN}, folders of these, or hf:NAME")
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
    return read_file(source.path, source.suffix, text_field)


def _expand(item: str, on_unknown: OnUnknown) -> Iterator[Source]:
    if item.startswith(huggingface.PREFIX):
        huggingface.parse_spec(item)
        yield Source(name=item, path=None, suffix=huggingface.PREFIX)
        return
    path = Path(item)
    if path.is_dir():
        yield from _of_folder(path, on_unknown)
        return
    _require_regular(path)
    if not suffix_of(path):
        raise DataError(f"{path}: unknown kind of file; required is {KNOWN}")
    yield Source(name=path.name, path=path, suffix=suffix_of(path))


def _of_folder(folder: Path, on_unknown: OnUnknown) -> Iterator[Source]:
    known: list[Path] = []
    unknown: list[Path] = []
    companions: list[Path] = []
    for file in sorted(_walk(folder)):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            companions.append(file)
        elif suffix_of(file):
            _require_regular(file)
            known.append(file)
        else:
            is_companion = any(fnmatch.fnmatchcase(file.name, name) for name in COMPANIONS)
            (companions if is_companion else unknown).append(file)
    _tell(folder, unknown, companions, on_unknown)
    if not known:
        raise DataError(f"{folder}: no {KNOWN} files in this folder")
    base = folder.resolve().parent
    for file in known:
        name = (folder.resolve() / file.relative_to(folder)).relative_to(base).as_posix()
        yield Source(name=name, path=file, suffix=suffix_of(file))


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, through links to other folders, but in no circle."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); allow it") from error

    above: dict[str, tuple[tuple[int, int], ...]] = {}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        mine = (status.st_dev, status.st_ino)
        path = above.get(place, ())
        if mine in path:
            raise DataError(
                f"{place}: a link to a folder above it, so that its files would be read for ever; "
                "remove the link"
            )
        folders[:] = [name for name in folders if not name.startswith(".")]
        above.update({os.path.join(place, name): (*path, mine) for name in folders})
        yield from (Path(place, name) for name in files)


def _require_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink() and not path.exists():
            message = f"{path}: a link to {os.readlink(path)}, which is not there; mend the link"
            raise DataError(message) from error
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: no such file or folder") from error
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _SPECIAL if test(mode)), "special file")
        raise DataError(
            f"{path}: a {kind}, but a regular file is required, since inputs are read more than "
            "once; write it to a file first"
        )


def _tell(folder: Path, unknown: list[Path], companions: list[Path], on_unknown: OnUnknown) -> None:
    """Name and count what is passed over; refuse what may be data unless told to go on."""
    if companions:
        logger.info("%s: passed over, as no data: %s", folder, _listed(folder, companions))
    if not unknown:
        return
    text = f"{folder}: {len(unknown)} files of an unknown kind: {_listed(folder, unknown)}"
    if on_unknown == "skip":
        logger.warning("%s; passed over", text)
        return
    raise DataError(
        f"{text}; required is {KNOWN}. Move them away, convert them, or pass over them with "
        "--on-unknown skip"
    )


def _listed(folder: Path, files: list[Path]) -> str:
    names = ", ".join(file.relative_to(folder).as_posix() for file in files[:_NAMED])
    more = len(files) - _NAMED
    return f"{names} and {more} more" if more > 0 else names


_SPECIAL = (
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)
