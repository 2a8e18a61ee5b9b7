"""The index of a token folder: what is in it, checked field by field. Reads no tokens.

`index.json` is the only file of a token folder that is trusted for names and sizes, so every
field is checked for type and consistency, and every file name is confined to the folder.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spectral_scale.errors import DataError
from spectral_scale.files.json_text import parse_json

INDEX_NAME = "index.json"
FORMAT = "spectral_scale.tokens"
FORMAT_VERSION = 1
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_DTYPE: np.dtype[Any] = np.dtype("<u8")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: its tokens, and where its documents end."""

    file: str
    """Name of the token file, inside the folder."""
    num_tokens: int
    """Tokens in it, at least 1."""
    sha256: str
    """Checksum of the token file."""
    documents_file: str
    """Name of the file of document ends (uint64, counted from the shard's first token)."""
    num_documents: int
    """Documents in it; each ends with the end-of-text token, none crosses shards."""
    documents_sha256: str
    """Checksum of the file of document ends."""


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One input that was read."""

    file: str
    """Name of the source, relative to the path that the user gave; `hf:...` for a data set."""
    bytes: int | None = None
    """Size of the source on disk; None for a data set."""
    sha256: str | None = None
    """Checksum of the source; None for a data set."""


@dataclass(frozen=True, kw_only=True)
class TokenIndex:
    """The content of `index.json`."""

    vocab_size: int
    """Exclusive upper bound of the token ids."""
    eos_token_id: int
    """The token that ends every document."""
    shards: tuple[ShardEntry, ...]
    """The shards, in the order of the token stream."""
    tokenizer_sha256: str
    """Checksum of `tokenizer/tokenizer.json`, which turned the text into these ids."""
    sources: tuple[SourceEntry, ...] = ()
    """The inputs, in the order they were read."""
    skipped: dict[str, int]
    """Documents left out, counted by reason."""
    request: dict[str, Any]
    """The request to `prepare`; repeating it on the same folder is a no-op."""
    created_by: str
    """Name and version of the program that wrote the folder."""

    @property
    def dtype_name(self) -> str:
        """`uint16` when every id fits in it, else `uint32`."""
        return dtype_name(self.vocab_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards, end-of-text tokens included."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that defines the token stream (not of names, inputs or versions)."""
        shards = [(s.num_tokens, s.sha256, s.documents_sha256) for s in self.shards]
        defining = [FORMAT_VERSION, self.dtype_name, self.vocab_size, self.eos_token_id]
        return canonical_sha256([*defining, self.tokenizer_sha256, shards])

    def to_json(self) -> str:
        """The text of `index.json`."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": self.dtype_name}
        counts = {"num_tokens": self.num_tokens, "num_documents": self.num_documents}
        return json.dumps({**head, **counts, **asdict(self)}, indent=1) + "\n"


def dtype_name(vocab_size: int) -> str:
    """The token dtype that a vocabulary of this size is stored in."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def canonical_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def confined_path(folder: Path, name: str) -> Path:
    """`folder / name`, refusing a name that leaves the folder (`..`, absolute, or by a link).

    Raises:
        DataError: the name points outside the folder.
    """
    pure = PurePosixPath(name)
    escapes = not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts
    path = folder / name if not escapes else folder
    if escapes or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{folder / INDEX_NAME}: the file name {name!r} points outside the token folder; "
            "this index was not written by `spectral-scale prepare`, do not use it"
        )
    return path


def parse_index(text: str, *, where: Path) -> TokenIndex:
    """Check and load the text of an index.

    Args:
        text: what `index.json` holds.
        where: the file, for messages.

    Raises:
        DataError: not an index, of another version, or inconsistent with itself.
    """
    try:
        value = parse_json(text)
        _check_format(value, where)
        index = _build(value)
        _check_consistent(index, value)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{where}: not a valid index ({reason}); prepare the folder again with --overwrite"
        ) from error
    return index


def _check_format(value: Any, where: Path) -> None:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f'an object with "format": "{FORMAT}" is required')
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{where}: token format version {version!r}, this program reads {FORMAT_VERSION}; "
            "prepare the folder again, or install the version that wrote it "
            f"({value.get('created_by')!r})"
        )


def _build(value: dict[str, Any]) -> TokenIndex:
    return TokenIndex(
        vocab_size=_typed(value, "vocab_size", int),
        eos_token_id=_typed(value, "eos_token_id", int),
        shards=tuple(_shard(item) for item in _typed(value, "shards", list)),
        tokenizer_sha256=_typed(value, "tokenizer_sha256", str),
        sources=tuple(SourceEntry(**item) for item in _typed(value, "sources", list)),
        skipped=_typed(value, "skipped", dict),
        request=_typed(value, "request", dict),
        created_by=_typed(value, "created_by", str),
    )


def _shard(item: dict[str, Any]) -> ShardEntry:
    return ShardEntry(
        file=_typed(item, "file", str),
        num_tokens=_typed(item, "num_tokens", int),
        sha256=_typed(item, "sha256", str),
        documents_file=_typed(item, "documents_file", str),
        num_documents=_typed(item, "num_documents", int),
        documents_sha256=_typed(item, "documents_sha256", str),
    )


def _typed(value: dict[str, Any], key: str, kind: type) -> Any:
    found = value[key]
    if not isinstance(found, kind) or isinstance(found, bool):
        raise TypeError(f"{key} is {found!r}, {kind.__name__} required")
    return found


def _check_consistent(index: TokenIndex, value: dict[str, Any]) -> None:
    if not index.shards:
        raise ValueError("no shards")
    for shard in index.shards:
        if not 1 <= shard.num_documents <= shard.num_tokens:
            raise ValueError(
                f"{shard.file}: {shard.num_tokens} tokens in {shard.num_documents} documents"
            )
    names = [name for shard in index.shards for name in (shard.file, shard.documents_file)]
    if len(set(names)) != len(names):
        raise ValueError("a file is named twice")
    if not 0 <= index.eos_token_id < index.vocab_size:
        raise ValueError(f"eos_token_id {index.eos_token_id} with vocab_size {index.vocab_size}")
    for key in ("num_tokens", "num_documents"):
        if value[key] != getattr(index, key):
            raise ValueError(f"{key} is {value[key]}, its shards hold {getattr(index, key)}")
    if value["dtype"] != index.dtype_name:
        raise ValueError(f"dtype {value['dtype']!r} with vocab_size {index.vocab_size}")
