"""One input document before tokenisation: where it stands, its bytes, and how they become text."""

import json
from typing import Any, Literal, NamedTuple

from spectral_scale.errors import DataError
from spectral_scale.files.json_text import parse_json

Reason = Literal[
    "empty_document", "invalid_utf8", "invalid_json", "missing_text", "id_beyond_vocabulary"
]


class Record(NamedTuple):
    """A document as it was read; small enough to send to another process."""

    where: str
    """File, and line or row, for messages."""
    offset: int
    """Bytes of the (uncompressed) file before `data`."""
    data: bytes | None
    """UTF-8 text, or one JSON object; None where a table has no text."""
    is_json: bool
    """Whether `data` is a JSON object that holds the text in a field."""


class BadDocument(DataError):
    """A document that cannot be used, and why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def extract_text(record: Record, text_field: str) -> str:
    """The text of a document.

    Raises:
        BadDocument: not UTF-8, not JSON, no such field, or nothing but white space.
    """
    if record.data is None:
        raise BadDocument("missing_text", f"{record.where}: no text in {text_field!r}")
    text = _decode(record, record.data)
    if record.is_json:
        text = _field(record, text, text_field)
    if not text or text.isspace():
        raise BadDocument("empty_document", f"{record.where}: empty document")
    return text


def _decode(record: Record, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(
            "invalid_utf8",
            f"{record.where}: invalid UTF-8 at byte {record.offset + error.start} "
            f"(0x{data[error.start]:02x}: {error.reason})",
        ) from error


def _field(record: Record, line: str, text_field: str) -> str:
    value = _parse(record, line)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BadDocument(
            "missing_text", f"{record.where}: a JSON {kind}, an object with {text_field!r} required"
        )
    text = value.get(text_field)
    if not isinstance(text, str):
        known = ", ".join(list(value)[:8])
        problem = "is not a string" if text_field in value else f"is missing (it has: {known})"
        raise BadDocument("missing_text", f"{record.where}: the field {text_field!r} {problem}")
    if not text.isascii():
        _refuse_lone_surrogates(record, text)
    return text


def _parse(record: Record, line: str) -> Any:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        byte = record.offset + len(line[: error.pos].encode())
        message = f"{record.where}: invalid JSON at byte {byte} ({error.msg})"
    except (ValueError, RecursionError) as error:
        message = f"{record.where}: invalid JSON ({error})"
    raise BadDocument("invalid_json", message)


def _refuse_lone_surrogates(record: Record, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocument(
            "invalid_utf8",
            f"{record.where}: character {error.start} of the text is the lone surrogate "
            f"U+{ord(text[error.start]):04X}, which no UTF-8 text can hold",
        ) from error
