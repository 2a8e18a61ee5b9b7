"""Bytes to text: whatever cannot be text is named with its place."""

import json

import pytest

from spectral_scale.data.records import BadDocument, Record, extract_text


def text_record(data: bytes | None, offset: int = 0) -> Record:
    return Record("a.txt", offset, data, False)


def json_record(value: object, offset: int = 100) -> Record:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Record("a.jsonl:7", offset, data, True)


def test_text_is_kept_exactly() -> None:
    text = " \r\n é漢\U0001f600\t\n"
    assert extract_text(text_record(text.encode()), "text") == text
    assert extract_text(json_record({"text": text, "more": 1}), "text") == text
    assert extract_text(json_record({"body": text}), "body") == text


@pytest.mark.parametrize(
    "record, reason, message",
    [
        (text_record(b"abc\xffd", 3), "invalid_utf8", r"a\.txt: invalid UTF-8 at byte 6 \(0xff"),
        (json_record(b'{"text": "\xe9"}'), "invalid_utf8", r"jsonl:7: invalid UTF-8 at byte 110"),
        (json_record(b'{"text": "a"'), "invalid_json", r"jsonl:7: invalid JSON at byte 112"),
        (json_record('{"é": }'.encode()), "invalid_json", r"invalid JSON at byte 107"),
        (json_record(b"[" * 100_000), "invalid_json", "invalid JSON"),
        (json_record(b'{"text": ' + b"9" * 5000 + b"}"), "invalid_json", "invalid JSON"),
        (json_record(["text"]), "missing_text", "a JSON list, an object with 'text' required"),
        (json_record({"body": "a", "id": 3}), "missing_text", r"missing \(it has: body, id\)"),
        (json_record({"text": 3}), "missing_text", "the field 'text' is not a string"),
        (json_record({"text": None}), "missing_text", "the field 'text' is not a string"),
        (json_record(b'{"text": "ab\\ud800"}'), "invalid_utf8", r"character 2 .* U\+D800"),
        (text_record(None), "missing_text", "no text in 'text'"),
        (text_record(b""), "empty_document", "empty document"),
        (text_record(" \n\u3000\t".encode()), "empty_document", "empty document"),
        (json_record({"text": ""}), "empty_document", "jsonl:7: empty document"),
    ],
)
def test_bad_documents_are_named(record: Record, reason: str, message: str) -> None:
    with pytest.raises(BadDocument, match=message) as caught:
        extract_text(record, "text")
    assert caught.value.reason == reason
