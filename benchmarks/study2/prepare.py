"""The token folders: characters of the books, so that embeddings are a small part of the model."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from study.prepare import find_books, is_prepared

from spectral_scale.data.prepare import prepare
from study2.settings import VOCABULARY

END, UNKNOWN = "<|endoftext|>", "<unk>"


def prepare_characters(output: Path, data: Path | None = None) -> Path:
    """Make OUTPUT/train and OUTPUT/valid unless they are there; returns OUTPUT.

    The text is read from `data`, or the folder named by SPECTRAL_SCALE_DATA. Raises StudyError
    without it.
    """
    if is_prepared(output):
        return output
    train, valid = find_books(data)
    tokenizer = make_tokenizer(train, output / "characters")
    prepare(train, output / "train", tokenizer=tokenizer)
    prepare([valid], output / "valid", tokenizer=output / "train")
    return output


def make_tokenizer(files: Iterable[Path], folder: Path) -> Path:
    """Write a tokenizer of single characters, the most frequent ones of the texts; its folder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    counts: Counter[str] = Counter()
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                counts.update(json.loads(line)["text"])
    # By number, then by code point: the same vocabulary whatever the order of reading.
    common = sorted(counts, key=lambda c: (-counts[c], c))[: VOCABULARY - 2]
    vocabulary = {symbol: i for i, symbol in enumerate([END, UNKNOWN, *common])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
    fast.save_pretrained(folder)
    return folder
