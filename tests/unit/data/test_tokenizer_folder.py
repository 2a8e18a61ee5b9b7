"""Tokenizers: taken from a folder or trained, self-contained, identified by one file."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectral_scale.data.tokenizer import (
    END_OF_TEXT,
    find_tokenizer,
    install_tokenizer,
    source_sha256,
    train_bpe_tokenizer,
)
from spectral_scale.data.tokens import file_sha256
from spectral_scale.errors import ConfigError, DataError

TEXT = ["the spectral weights of the matrix are the weights of the spectrum é漢\n"] * 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_bpe_tokenizer(iter(TEXT), vocab_size=300, target=target)
    return target


def texts() -> Iterator[str]:
    return (f"word{i % 97} of{i % 7} {i}" for i in range(2000))


def test_training_is_deterministic(tmp_path: Path) -> None:
    one = train_bpe_tokenizer(texts(), vocab_size=500, target=tmp_path / "one")
    two = train_bpe_tokenizer(texts(), vocab_size=500, target=tmp_path / "two")
    assert one == two
    assert one.vocab_size == 500 and one.eos_token_id == 0
    assert file_sha256(tmp_path / "one/tokenizer.json") == one.sha256


def test_trained_tokenizer_loads_everywhere_and_decodes_exactly(trained: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(trained), local_files_only=True)
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.eos_token_id == 0
    text = "  Any\ttext \U0001f600, even ünknown.\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_little_text_gives_a_smaller_vocabulary_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = train_bpe_tokenizer(iter(["abab"]), vocab_size=1000, target=tmp_path)
    assert 257 <= facts.vocab_size < 300
    assert f"only has enough for {facts.vocab_size} of 1000" in caplog.text


def test_vocabulary_must_hold_every_byte(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--train-bpe 256: at least 257 entries"):
        train_bpe_tokenizer(iter(TEXT), vocab_size=256, target=tmp_path)


def test_installed_copy_is_the_same_file(trained: Path, tmp_path: Path) -> None:
    facts = install_tokenizer(find_tokenizer(trained), tmp_path / "copy")
    assert facts.eos_token_id == 0
    original = (trained / "tokenizer.json").read_bytes()
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == original
    again = install_tokenizer(find_tokenizer(tmp_path / "copy"), tmp_path / "again")
    assert again == facts


def test_vocabulary_and_merges_alone_are_enough(trained: Path, tmp_path: Path) -> None:
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    source = tmp_path / "gpt2"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = {"tokenizer_class": "GPT2Tokenizer", **special}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    facts = install_tokenizer(find_tokenizer(source), tmp_path / "out")
    assert facts.eos_token_id == 0
    assert _ids(tmp_path / "out") == _ids(trained)


def _ids(folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT[0]).ids
    return ids


def test_installed_tokenizer_encodes_as_transformers_does(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    install_tokenizer(trained, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert tokenizer(TEXT[0], add_special_tokens=False)["input_ids"] == _ids(tmp_path)


def test_a_token_folder_stands_for_its_tokenizer(trained: Path) -> None:
    assert find_tokenizer(trained.parent) == trained


def test_no_end_of_text_token(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match='no end-of-text token.*"eos_token"'):
        install_tokenizer(tmp_path, tmp_path / "out")


def test_absent_and_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'gpt2': no such local folder"):
        find_tokenizer("gpt2")
    with pytest.raises(DataError, match="no tokenizer in this folder"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        install_tokenizer(find_tokenizer(tmp_path), tmp_path / "out")


def test_code_of_a_tokenizer_is_never_run(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "evil"
    source.mkdir()
    marker = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        install_tokenizer(source, tmp_path / "out")
    assert not marker.exists()


def test_source_identity_follows_the_files(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "README.md").write_text("no part of it")
    assert source_sha256(copy) == source_sha256(trained)
    (copy / "tokenizer_config.json").write_text("{}")
    assert source_sha256(copy) != source_sha256(trained)
