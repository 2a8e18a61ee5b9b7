"""One strict reader for the JSON that users hand over."""

import json
from pathlib import Path

import pytest

from spectral_scale.config.deepspeed_json import read_deepspeed_json
from spectral_scale.data.records import BadDocument, Record, extract_text
from spectral_scale.data.token_index import parse_index
from spectral_scale.errors import ConfigError, DataError
from spectral_scale.files.json_text import parse_json


def test_values_are_those_of_json() -> None:
    text = '{"a": [1, 2.5, null, true, "x"], "b": {"a": {}}}'
    assert parse_json(text) == json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        parse_json("{")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200_000)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"c": 1, "a": 2, "a": 3}}]'])
def test_a_key_that_is_given_twice_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="the key 'a' is given twice"):
        parse_json(text)


def test_deepspeed_files(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}')
    with pytest.raises(ConfigError, match=r"ds\.json is not JSON: the key 'zero_optimization'"):
        read_deepspeed_json(str(file))


def test_records_and_indexes() -> None:
    record = Record("x.jsonl:3", 0, b'{"text": "one", "text": "two"}', True)
    with pytest.raises(BadDocument, match=r"x\.jsonl:3: invalid JSON \(the key 'text' is given"):
        extract_text(record, "text")
    with pytest.raises(DataError, match="the key 'format' is given twice"):
        parse_index('{"format": 1, "format": 2}', where=Path("index.json"))
