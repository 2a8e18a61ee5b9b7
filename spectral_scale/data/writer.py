"""Writing a token folder: documents in, checksummed shards and a last-moment index out."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spectral_scale.data.token_index import (
    DTYPES,
    INDEX_NAME,
    OFFSET_DTYPE,
    ShardEntry,
    TokenIndex,
    dtype_name,
)
from spectral_scale.files.durable import fsync_descriptor, fsync_directory, fsync_path


class TokenWriter:
    """Appends documents to the shards of one folder.

    A shard ends with the document that fills it, so no document crosses shards.

    Args:
        folder: an existing folder without shards.
        vocab_size: decides the dtype; the caller has checked the ids against it.
        eos_token_id: written after every document.
        shard_tokens: a shard is closed once it holds this many tokens.
    """

    def __init__(
        self, folder: Path, *, vocab_size: int, eos_token_id: int, shard_tokens: int
    ) -> None:
        self.folder = folder
        self._dtype = DTYPES[dtype_name(vocab_size)]
        self._eos = np.array([eos_token_id], dtype=self._dtype)
        self._shard_tokens = shard_tokens
        self._shards: list[ShardEntry] = []
        self._stream: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._ends: list[int] = []

    def append(self, ids: np.ndarray | Sequence[int]) -> None:
        """Write one document (1-D ids, without end-of-text token) and the end-of-text token."""
        data = np.concatenate([np.asarray(ids, dtype=self._dtype), self._eos])
        if self._stream is None:
            self._stream = (self.folder / self._name(".bin")).open("wb")
        self._stream.write(data.data)
        self._hash.update(data.data)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(data))
        if self._ends[-1] >= self._shard_tokens:
            self._close_shard()

    def close(self) -> tuple[ShardEntry, ...]:
        """Finish the last shard; every shard is on disk (fsync) when this returns."""
        if self._stream is not None:
            self._close_shard()
        return tuple(self._shards)

    def abandon(self) -> None:
        """Close the open file without finishing the shard."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _name(self, suffix: str) -> str:
        return f"shard_{len(self._shards):05d}{suffix}"

    def _close_shard(self) -> None:
        if self._stream is None:
            raise RuntimeError("no shard is open")
        sync_and_close(self._stream)
        ends = np.array(self._ends, dtype=OFFSET_DTYPE).tobytes()
        with (self.folder / self._name(".docs.bin")).open("wb") as stream:
            stream.write(ends)
            sync_and_close(stream)
        self._shards.append(
            ShardEntry(
                file=self._name(".bin"),
                num_tokens=self._ends[-1],
                sha256=self._hash.hexdigest(),
                documents_file=self._name(".docs.bin"),
                num_documents=len(self._ends),
                documents_sha256=hashlib.sha256(ends).hexdigest(),
            )
        )
        self._stream, self._hash, self._ends = None, hashlib.sha256(), []


def write_index(
    folder: Path, index: TokenIndex, *, replace: Callable[[Path, Path], None] = os.replace
) -> None:
    """Commit a folder: its index appears whole or not at all, after everything it names."""
    fsync_directory(folder)
    temporary = folder / f"{INDEX_NAME}.tmp"
    with temporary.open("wb") as stream:
        stream.write(index.to_json().encode())
        sync_and_close(stream)
    replace(temporary, folder / INDEX_NAME)
    fsync_directory(folder)


def sync_and_close(stream: BinaryIO) -> None:
    """Flush a file to disk and close it."""
    stream.flush()
    fsync_descriptor(stream.fileno())
    stream.close()


def sync_files(folder: Path) -> None:
    """Flush the files of a folder, which others wrote, and the folder itself to disk."""
    for file in folder.iterdir():
        fsync_path(file)
    fsync_directory(folder)
