"""The prepare command: arguments in, one result out, errors with their exit code."""

import argparse
import json
from pathlib import Path

import pytest

from spectral_scale.cli import prepare as command
from spectral_scale.data.tokens import open_tokens
from spectral_scale.errors import ConfigError, DataError


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["prepare", *map(str, arguments)])
    return command.run(args)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    rows = [{"body": f"text number {i} " * 5} for i in range(30)] + [{"body": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prepare_prints_what_was_made(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", lines, "--train-bpe", 300, "--output", tmp_path / "out"]
    arguments += ["--text-field", "body", "--workers", 1]
    assert call(*arguments) == 0
    folder = open_tokens(tmp_path / "out")
    first = capsys.readouterr().out
    assert first == (
        f"{tmp_path / 'out'}: {folder.num_tokens:,} tokens in 30 documents, vocabulary "
        f"{folder.vocab_size}, left out: 1 empty_document\n"
    )
    assert call(*arguments) == 0
    assert "already prepared" in capsys.readouterr().out


def test_json_of_a_split(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", lines, "--train-bpe", 300, "--output", tmp_path / "out", "--seed", 2]
    options = ["--split-validation", 0.3, "--shard-tokens", 100, "--workers", 1]
    assert call(*arguments, *options, "--text-field", "body", "--format", "json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["already_done"] is False
    train, valid = result["folders"]
    assert train["folder"].endswith("out/train") and valid["folder"].endswith("out/valid")
    assert train["num_documents"] + valid["num_documents"] == 30
    assert train["num_shards"] > 1
    assert train["fingerprint"] == open_tokens(tmp_path / "out/train").fingerprint
    assert train["tokenizer_sha256"] == valid["tokenizer_sha256"]


def test_tokenizer_of_a_token_folder(lines: Path, tmp_path: Path) -> None:
    head = ["--input", lines, "--text-field", "body", "--workers", 1]
    assert call(*head, "--train-bpe", 300, "--output", tmp_path / "a") == 0
    assert call(*head, "--tokenizer", tmp_path / "a", "--output", tmp_path / "b") == 0
    assert open_tokens(tmp_path / "a").fingerprint == open_tokens(tmp_path / "b").fingerprint


def test_errors_propagate_with_their_exit_code(lines: Path, tmp_path: Path) -> None:
    head = ["--input", lines, "--output", tmp_path / "out", "--workers", 1]
    with pytest.raises(DataError, match=r"lines\.jsonl:1: the field 'text' is missing") as caught:
        call(*head, "--train-bpe", 300)
    assert caught.value.exit_code == 78
    with pytest.raises(ConfigError, match="at least 257"):
        call(*head, "--train-bpe", 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output", "o", "--train-bpe", "300"],
        ["--input", "a", "--output", "o"],
        ["--input", "a", "--output", "o", "--train-bpe", "300", "--tokenizer", "t"],
        ["--input", "a", "--output", "o", "--train-bpe", "300", "--on-bad", "ignore"],
        ["--input", "a", "--outp", "o", "--train-bpe", "300"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("--help")
    shown = capsys.readouterr().out
    assert "spectral-scale prepare --input texts/ --train-bpe 8192" in shown
    assert "--split-validation" in shown
