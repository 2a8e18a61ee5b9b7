"""Encoding: pieces, special tokens, and processes change nothing."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from spectral_scale.data import encode
from spectral_scale.data.encode import (
    DocumentEncoder,
    EncodeSettings,
    cut_pieces,
    encode_records,
)
from spectral_scale.data.records import Record
from spectral_scale.data.tokenizer import END_OF_TEXT, train_bpe_tokenizer
from spectral_scale.errors import DataError

WORDS = "the of and spectral training\t weight. matrix, sigma! rank? é漢 12 don't  x\n\n y\n".split(
    " "
)


def random_text(seed: int, words: int = 300) -> str:
    chosen = random.Random(seed)
    return "".join(chosen.choice(WORDS) + chosen.choice([" ", " ", "\n"]) for _ in range(words))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EncodeSettings:
    target = tmp_path_factory.mktemp("tokenizer")
    facts = train_bpe_tokenizer(
        (random_text(seed) for seed in range(20)), vocab_size=400, target=target
    )
    return EncodeSettings(
        tokenizer_file=target / "tokenizer.json", vocab_size=facts.vocab_size, text_field="text"
    )


def records(texts: list[str]) -> list[Record]:
    return [Record(f"a:{i}", 0, text.encode(), False) for i, text in enumerate(texts)]


def test_pieces_join_to_the_text_and_end_with_lines_or_words() -> None:
    for seed in range(20):
        text = random_text(seed)
        pieces = cut_pieces(text, 50)
        assert "".join(pieces) == text
        assert len(pieces) > 5
        for left, right in zip(pieces[:-1], pieces[1:], strict=True):
            at_line = left[-1] == "\n" and not left[-2].isspace() and not right[0].isspace()
            assert at_line or (left[-1].isalpha() and right[1].isalpha())


def long_line(seed: int) -> str:
    """A document without a line end: words, signs and numbers of several scripts."""
    return " ".join(random_text(seed, 400).split())


def test_a_long_line_is_cut_into_short_pieces_of_the_same_ids(
    settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = long_line(1)
    expected = DocumentEncoder(settings).encode(records([text]))[0].ids
    pieces = cut_pieces(text, 40)
    assert "".join(pieces) == text and len(pieces) > 10 and max(map(len, pieces)) <= 80
    monkeypatch.setattr(
        encode, "cut_pieces", lambda text, is_safe: cut_pieces(text, 40, is_safe=is_safe)
    )
    found = DocumentEncoder(settings).encode(records([text]))[0].ids
    assert expected is not None and found is not None and np.array_equal(found, expected)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_other_tokenizers_are_asked_where_a_line_may_be_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Metaspace marks the beginning of a text, without a split between words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator([long_line(seed) for seed in range(20)], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = DocumentEncoder(
        EncodeSettings(
            tokenizer_file=tmp_path / "tokenizer.json", vocab_size=400, text_field="text"
        )
    )
    text = long_line(30)
    expected = encoder.encode(records([text]))[0].ids
    pieces: list[str] = []

    def cut(text: str, is_safe: object) -> list[str]:
        pieces.extend(cut_pieces(text, 40, is_safe=is_safe))  # type: ignore[arg-type]
        return pieces

    monkeypatch.setattr(encode, "cut_pieces", cut)
    found = encoder.encode(records([text]))[0].ids
    assert len(pieces) > 2
    assert expected is not None and found is not None and np.array_equal(found, expected)


def test_pieces_without_a_place_to_cut() -> None:
    assert cut_pieces("x" * 100, 10) == ["x" * 100]
    assert cut_pieces("a\n\nb" * 30, 10) == ["a\n\nb" * 30]
    assert cut_pieces("", 10) == [""]


def test_pieces_do_not_change_the_ids(
    settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [random_text(seed) for seed in range(30)]
    whole = DocumentEncoder(settings).encode(records(texts))
    monkeypatch.setattr(
        encode, "cut_pieces", lambda text, is_safe: cut_pieces(text, 40, is_safe=is_safe)
    )
    pieces = DocumentEncoder(settings).encode(records(texts))
    for one, other in zip(whole, pieces, strict=True):
        assert one.ids is not None and np.array_equal(one.ids, other.ids)


def test_the_tokenizer_gets_few_characters_at_once(
    settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results take much memory until a call returns; the ids do not depend on the calls."""
    texts = [random_text(seed) for seed in range(30)]
    whole = DocumentEncoder(settings).encode(records(texts))
    monkeypatch.setattr(encode, "_CHARACTERS_AT_ONCE", 100)
    monkeypatch.setattr(encode, "cut_pieces", lambda text, is_safe: cut_pieces(text, 20))
    encoder = DocumentEncoder(settings)
    sizes: list[list[int]] = []

    class Counted:
        def encode_batch_fast(self, group: list[str], **options: bool) -> object:
            sizes.append([len(piece) for piece in group])
            return tokenizer.encode_batch_fast(group, **options)

    tokenizer, encoder._tokenizer = encoder._tokenizer, Counted()
    found = encoder.encode(records(texts))
    assert all(
        a.ids is not None and np.array_equal(a.ids, b.ids)
        for a, b in zip(whole, found, strict=True)
    )
    assert all(len(group) == 1 or sum(group) <= 100 for group in sizes)
    assert max(map(len, sizes)) > 1 and sum(map(sum, sizes)) >= sum(map(len, texts))


def test_cutting_anywhere_would_change_the_ids(
    settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    texts = [random_text(seed) for seed in range(30)]
    whole = DocumentEncoder(settings).encode(records(texts))
    monkeypatch.setattr(
        encode,
        "cut_pieces",
        lambda text, is_safe: [text[i : i + 40] for i in range(0, len(text), 40)],
    )
    pieces = DocumentEncoder(settings).encode(records(texts))
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(whole, pieces, strict=True))


def test_text_cannot_fake_the_end_of_a_document(settings: EncodeSettings) -> None:
    found = DocumentEncoder(settings).encode(records([f"one {END_OF_TEXT} two"]))[0]
    assert found.ids is not None and 0 not in found.ids
    tokenizer = DocumentEncoder(settings)._tokenizer
    assert tokenizer.decode(found.ids.tolist()) == f"one {END_OF_TEXT} two"


def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied(
    settings: EncodeSettings, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(settings.tokenizer_file))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=1000)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    short = EncodeSettings(
        tokenizer_file=tmp_path / "tokenizer.json", vocab_size=400, text_field="text"
    )
    texts = records([random_text(0), "a"])
    wanted = [d.ids for d in DocumentEncoder(settings).encode(texts)]
    found = [d.ids for d in DocumentEncoder(short).encode(texts)]
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_bad_documents_stand_between_good_ones(settings: EncodeSettings) -> None:
    mixed = [
        Record("a:1", 0, b"good", False),
        Record("a:2", 0, b"\xff", False),
        Record("a:3", 0, json.dumps({"text": " "}).encode(), True),
        Record("a:4", 0, b"fine", False),
        Record("a:5", 0, None, False),
    ]
    found = DocumentEncoder(settings).encode(mixed)
    reasons = [None, "invalid_utf8", "empty_document", None, "missing_text"]
    assert [d.reason for d in found] == reasons
    assert [d.ids is None for d in found] == [False, True, True, False, True]
    assert [d.input_bytes for d in found] == [4, 1, 13, 4, 0]


def test_ids_beyond_the_vocabulary_are_named(settings: EncodeSettings) -> None:
    small = EncodeSettings(tokenizer_file=settings.tokenizer_file, vocab_size=10, text_field="text")
    found = DocumentEncoder(small).encode(records(["abc"]))[0]
    assert found.ids is None and found.reason == "id_beyond_vocabulary"
    assert "a:0: token id" in found.message and "vocabulary of 10" in found.message


def test_processes_give_the_same_documents_in_order(
    settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_RECORDS", 3)
    texts = records([random_text(seed, words=1 + seed * 7 % 40) for seed in range(50)])
    texts[10] = Record("a:10", 0, b"\xff", False)
    alone = list(encode_records(iter(texts), settings, workers=1))
    several = list(encode_records(iter(texts), settings, workers=2))
    assert len(alone) == len(several) == 50
    for one, other in zip(alone, several, strict=True):
        assert np.array_equal(one.ids, other.ids) or one.ids is other.ids is None  # type: ignore
        assert one.message == other.message


def test_reading_stays_a_few_batches_ahead(
    settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_RECORDS", 1)
    read: list[int] = []

    def endless() -> object:
        while True:
            read.append(1)
            yield Record("a", 0, b"text", False)

    found = encode_records(endless(), settings, workers=2)  # type: ignore[arg-type]
    for _ in range(10):
        next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(read) < 25


def test_a_dead_worker_is_an_error_not_a_hang(
    settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_encode_in_worker", os._exit)
    monkeypatch.setattr(encode, "_batches", lambda records: [1])
    with pytest.raises(DataError, match="one of 2 worker processes died.*fewer --workers"):
        list(encode_records(records(["a"]), settings, workers=2))
