"""A trained tokenizer, used again on other text, is the same tokenizer."""

from pathlib import Path

from spectral_scale.data.prepare import prepare


def test_trained_tokenizer_keeps_its_identity(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    (first,) = prepare([text], tmp_path / "a", train_bpe=300, progress=False).folders
    (second,) = prepare(
        [text], tmp_path / "b", tokenizer=first.tokenizer_path, progress=False
    ).folders
    assert first.tokenizer_sha256 == second.tokenizer_sha256
