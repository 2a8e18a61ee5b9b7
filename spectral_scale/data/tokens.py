"""Reading a token folder: one stream of token ids, memory-mapped from its shards.

Knows nothing of text, sequences or batches.
"""

import hashlib
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from spectral_scale.data.token_index import (
    DTYPES,
    INDEX_NAME,
    OFFSET_DTYPE,
    ShardEntry,
    TokenIndex,
    confined_path,
    parse_index,
)
from spectral_scale.errors import DataError

TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_NAME = "tokenizer.json"
INCOMPLETE_NAME = "INCOMPLETE"
_BLOCK_TOKENS = 1 << 22


class TokenFolder:
    """The token stream of one prepared folder, read only. Made by `open_tokens`.

    Safe to hand to other processes: only the path is sent, and the files are mapped again.
    """

    def __init__(self, path: Path, index: TokenIndex) -> None:
        self.path = path
        self.index = index
        self._dtype = DTYPES[index.dtype_name]
        self._starts = [0, *accumulate(shard.num_tokens for shard in index.shards)]
        self._maps: dict[int, np.memmap] = {}

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return open_tokens, (self.path,)

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream, end-of-text tokens included."""
        return self._starts[-1]

    @property
    def vocab_size(self) -> int:
        """Exclusive upper bound of the token ids."""
        return self.index.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The token that ends every document."""
        return self.index.eos_token_id

    @property
    def fingerprint(self) -> str:
        """SHA-256 shared by exactly the folders with the same stream in the same shards."""
        return self.index.fingerprint

    @property
    def tokenizer_sha256(self) -> str:
        """Checksum of the tokenizer; equal for folders whose ids mean the same."""
        return self.index.tokenizer_sha256

    @property
    def tokenizer_path(self) -> Path:
        """The folder's own copy of the tokenizer, loadable by transformers.AutoTokenizer."""
        return self.path / TOKENIZER_FOLDER

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the stream.

        Returns:
            int64 array of shape (stop - start,), a copy.

        Raises:
            ValueError: not 0 <= start <= stop <= num_tokens.
            DataError: an id is not below the vocabulary size (a corrupt shard).
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start}..{stop} of a folder with {self.num_tokens}")
        ids = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            shard = bisect_right(self._starts, position) - 1
            end = min(stop, self._starts[shard + 1])
            base = self._starts[shard]
            part = self._map(shard)[position - base : end - base]
            self._check_ids(part, shard, position - base)
            ids[position - start : end - start] = part
            position = end
        return ids

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Start of each document in the stream: int64, shape (documents,), ascending.

        Shards store where documents end, counted from their own first token. A shard of 8 tokens
        with the ends 5 and 8, and one of 4 tokens with the end 4, give the starts 0, 5 and 8.

        Raises:
            DataError: a file of document ends is corrupt.
        """
        starts = np.empty(self.index.num_documents, dtype=np.int64)
        filled = 0
        for base, shard in zip(self._starts, self.index.shards, strict=False):
            ends = self._document_ends(shard)
            starts[filled] = base
            starts[filled + 1 : filled + len(ends)] = ends[:-1] + base
            filled += len(ends)
        return starts

    def verify(self) -> None:
        """Read everything: checksums, ids below the vocabulary, document ends, tokenizer.

        Raises:
            DataError: names the file, and the offset where there is one.
        """
        self._verify_checksum(self.tokenizer_path / TOKENIZER_NAME, self.tokenizer_sha256)
        for number, shard in enumerate(self.index.shards):
            for offset in range(0, shard.num_tokens, _BLOCK_TOKENS):
                self._check_ids(self._map(number)[offset : offset + _BLOCK_TOKENS], number, offset)
            self._verify_checksum(self.path / shard.file, shard.sha256)
            self._verify_checksum(self.path / shard.documents_file, shard.documents_sha256)
            self._verify_documents(number)

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            file = confined_path(self.path, self.index.shards[shard].file)
            self._maps[shard] = np.memmap(file, dtype=self._dtype, mode="r")
        return self._maps[shard]

    def _check_ids(self, part: np.ndarray, shard: int, offset: int) -> None:
        if int(part.max()) < self.vocab_size:
            return
        bad = offset + int(np.argmax(part >= self.vocab_size))
        token = int(self._map(shard)[bad])
        raise DataError(
            f"{self.path / self.index.shards[shard].file}: token {bad} (byte "
            f"{bad * self._dtype.itemsize}) is id {token}, beyond the vocabulary of "
            f"{self.vocab_size}; the file is corrupt, {_REDO}"
        )

    def _document_ends(self, shard: ShardEntry) -> np.ndarray:
        file = confined_path(self.path, shard.documents_file)
        ends = np.fromfile(file, dtype=OFFSET_DTYPE).astype(np.int64)
        if ends[0] < 1 or ends[-1] != shard.num_tokens or (np.diff(ends) < 1).any():
            raise DataError(
                f"{file}: the document ends do not ascend to {shard.num_tokens}, the shard's "
                f"length; the file is corrupt, {_REDO}"
            )
        return ends

    def _verify_documents(self, number: int) -> None:
        shard = self.index.shards[number]
        last = self._map(number)[self._document_ends(shard) - 1]
        wrong = np.flatnonzero(last != self.eos_token_id)
        if wrong.size:
            raise DataError(
                f"{self.path / shard.documents_file}: document {wrong[0]} does not end with the "
                f"end-of-text token {self.eos_token_id}; {_REDO}"
            )

    @staticmethod
    def _verify_checksum(file: Path, required: str) -> None:
        found = file_sha256(file)
        if found != required:
            raise DataError(
                f"{file}: checksum {found[:16]}..., the index has {required[:16]}...; "
                f"the file is corrupt, {_REDO}"
            )


_REDO = "prepare the folder again with --overwrite"


def open_tokens(folder: str | Path) -> TokenFolder:
    """Open a folder that `prepare` wrote; cheap checks only (`TokenFolder.verify` reads it all).

    Raises:
        DataError: missing, unfinished, or files that are absent or of the wrong size.
    """
    path = Path(folder)
    index = read_index(path)
    itemsize = DTYPES[index.dtype_name].itemsize
    for shard in index.shards:
        _check_size(confined_path(path, shard.file), shard.num_tokens * itemsize)
        documents = confined_path(path, shard.documents_file)
        _check_size(documents, shard.num_documents * OFFSET_DTYPE.itemsize)
    return TokenFolder(path, index)


def read_index(folder: Path) -> TokenIndex:
    """The index of a token folder.

    Raises:
        DataError: there is none (and why), or it cannot be used.
    """
    file = folder / INDEX_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(_why_no_index(folder, error)) from error
    return parse_index(text, where=file)


def _why_no_index(folder: Path, error: Exception) -> str:
    make = f"make it with `spectral-scale prepare --input FILES... --output {folder} ...`"
    if not folder.exists():
        return f"{folder}: no such token folder; {make}"
    if not folder.is_dir():
        return f"{folder}: a file, but a token folder is required; {make}"
    if (folder / INCOMPLETE_NAME).exists():
        return f"{folder}: preparing it was interrupted; run the same prepare command again"
    if inner := [name.parent.name for name in sorted(folder.glob(f"*/{INDEX_NAME}"))]:
        return f"{folder}: holds the token folders {', '.join(inner)}; name one of them"
    if not (folder / INDEX_NAME).exists():
        return f"{folder}: not a token folder (no {INDEX_NAME}); {make}"
    return f"{folder / INDEX_NAME}: cannot be read ({error}); {_REDO}"


def _check_size(file: Path, required_bytes: int) -> None:
    if not file.is_file():
        raise DataError(f"{file}: missing, though the index names it; {_REDO}")
    found = file.stat().st_size
    if found != required_bytes:
        raise DataError(
            f"{file}: {found} bytes, the index requires {required_bytes}; truncated or changed, "
            f"{_REDO}"
        )


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
