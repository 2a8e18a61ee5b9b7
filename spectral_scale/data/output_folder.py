"""The output folder of `prepare`: whose it is, whether it is done, and starting it afresh."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectral_scale.data.token_index import INDEX_NAME, SourceEntry
from spectral_scale.data.tokens import INCOMPLETE_NAME, TOKENIZER_FOLDER, TokenFolder, open_tokens
from spectral_scale.errors import DataError
from spectral_scale.files.durable import warn_of_limits
from spectral_scale.files.locks import acquire_lock, soft_marker

LOCK_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and keep other `prepare` processes out of it.

    Raises:
        DataError: another process holds it.
    """
    from filelock import Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(folder / LOCK_NAME, timeout=0)
    except Timeout as error:
        marker = soft_marker(folder / LOCK_NAME)
        hint = f", or remove {marker} if that one was killed" if marker.exists() else ""
        raise DataError(
            f"{folder}: another process is preparing it; wait for that one{hint}"
        ) from error
    warn_of_limits(folder)
    try:
        yield
    finally:
        lock.release()


def refuse_foreign(folder: Path, *, allowed: tuple[str, ...] = ()) -> None:
    """Refuse to write into something that `prepare` did not make.

    Args:
        folder: may be absent or empty.
        allowed: names that may be there besides.

    Raises:
        DataError: a file, or a folder with other content.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file, the output must be a folder")
    if not folder.exists() or _is_ours(folder):
        return
    ours = (LOCK_NAME, soft_marker(Path(LOCK_NAME)).name)
    others = sorted(p.name for p in folder.iterdir() if p.name not in (*ours, *allowed))
    if others:
        raise DataError(
            f"{folder}: not empty (it has {others[0]!r}) and not a token folder; choose another "
            "output folder"
        )


def finished(
    folder: Path, *, request: dict[str, Any], sources: tuple[SourceEntry, ...], overwrite: bool
) -> TokenFolder | None:
    """The folder when it already holds exactly this; None when it is to be written.

    Raises:
        DataError: it holds the result of another request, or is damaged, and not `overwrite`.
    """
    if not (folder / INDEX_NAME).exists():
        return None
    try:
        found = open_tokens(folder)
    except DataError:
        if overwrite:
            return None
        raise
    wanted = {**request, "sources": [asdict(source) for source in sources]}
    present = {**found.index.request, "sources": [asdict(s) for s in found.index.sources]}
    differing = [key for key in wanted if wanted[key] != present.get(key)]
    if not differing:
        return found
    if overwrite:
        return None
    raise DataError(
        f"{folder}: already prepared from a different {', '.join(differing)}; choose another "
        "output folder, or replace this one with --overwrite"
    )


def start_afresh(folder: Path) -> None:
    """Empty a folder of what `prepare` writes, and nothing else, and mark it unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    # From here on the folder counts as unfinished, whenever this process ends.
    (folder / INCOMPLETE_NAME).touch()
    (folder / INDEX_NAME).unlink(missing_ok=True)
    (folder / f"{INDEX_NAME}.tmp").unlink(missing_ok=True)
    for shard in folder.glob("shard_[0-9]*.bin"):
        shard.unlink()
    tokenizer = folder / TOKENIZER_FOLDER
    if tokenizer.is_symlink():
        tokenizer.unlink()
    elif tokenizer.exists():
        shutil.rmtree(tokenizer)


def mark_finished(folder: Path) -> None:
    """Remove the mark of an unfinished folder; its index has been written."""
    (folder / INCOMPLETE_NAME).unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    if (folder / INCOMPLETE_NAME).exists():
        return True
    index = folder / INDEX_NAME
    return index.is_file() and '"spectral_scale.tokens"' in index.read_text(errors="replace")[:4096]
