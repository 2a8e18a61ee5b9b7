"""The tokenizer of a token folder: taken from a local folder, or trained on the inputs.

`tokenizer/tokenizer.json` inside the token folder is the one truth: the encoder loads that
file, its checksum is the tokenizer's identity, and export copies it. Code shipped with a
tokenizer is never run, and nothing is downloaded.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_scale.data.token_index import canonical_sha256
from spectral_scale.data.tokens import TOKENIZER_FOLDER, TOKENIZER_NAME, file_sha256
from spectral_scale.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
MIN_BPE_VOCAB = 257
_CONFIG_NAME = "tokenizer_config.json"
_FILES = (
    *(TOKENIZER_NAME, _CONFIG_NAME, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "config.json"),
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """The properties of a tokenizer that its token folder records."""

    vocab_size: int
    """The largest id it can produce, plus one."""
    eos_token_id: int
    """Id of the token that ends every document."""
    sha256: str
    """SHA-256 of `tokenizer.json` in the token folder."""


def find_tokenizer(folder: str | Path) -> Path:
    """Find the folder of a tokenizer; a token folder refers to the tokenizer inside it.

    Raises:
        DataError: no such folder, or no tokenizer in it.
    """
    path = Path(folder)
    if (path / TOKENIZER_FOLDER / TOKENIZER_NAME).is_file():
        path = path / TOKENIZER_FOLDER
    if not path.is_dir():
        raise DataError(
            f"tokenizer {str(folder)!r}: no such local folder (and none is downloaded); "
            "give a folder with tokenizer.json or vocab.json + merges.txt, or use --train-bpe"
        )
    if not any((path / name).is_file() for name in _FILES if name != "config.json"):
        raise DataError(f"{path}: no tokenizer in this folder, e.g. {TOKENIZER_NAME}")
    return path


def source_sha256(folder: Path) -> str:
    """Identity of a tokenizer folder as given, without loading it."""
    present = [name for name in _FILES if (folder / name).is_file()]
    return canonical_sha256({name: file_sha256(folder / name) for name in present})


def install_tokenizer(source: Path, target: Path) -> TokenizerFacts:
    """Copy a tokenizer into a token folder.

    Args:
        source: from `find_tokenizer`.
        target: the folder to create `tokenizer.json` and `tokenizer_config.json` in.

    Raises:
        DataError: it cannot be loaded, has no `tokenizers` version, or no end-of-text token.
    """
    tokenizer = _load(source)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{source}: this tokenizer has no end-of-text token, which must end every document; "
            f'name one as "eos_token" in {_CONFIG_NAME}'
        )
    _save(tokenizer, target)
    backend = tokenizer.backend_tokenizer
    if _same_tokenizer(source / TOKENIZER_NAME, backend):
        # Byte for byte, so that its checksum does not depend on the library's version.
        shutil.copyfile(source / TOKENIZER_NAME, target / TOKENIZER_NAME)
    return TokenizerFacts(
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token_id=tokenizer.eos_token_id,
        sha256=file_sha256(target / TOKENIZER_NAME),
    )


def is_same_tokenizer(source: Path, installed: Path) -> bool:
    """True if a tokenizer folder encodes like that of a token folder, regardless of file layout.

    Raises:
        DataError: `source` cannot be loaded.
    """
    return _same_tokenizer(installed / TOKENIZER_NAME, _load(source).backend_tokenizer)


def train_bpe_tokenizer(texts: Iterator[str], *, vocab_size: int, target: Path) -> TokenizerFacts:
    """Train a byte-level BPE tokenizer; the same texts give the same file.

    Args:
        texts: what to train on; streamed.
        vocab_size: entries, from 257 (the bytes and the end-of-text token).
        target: the folder to create `tokenizer.json` and `tokenizer_config.json` in.

    Raises:
        ConfigError: the vocabulary is too small for byte-level BPE.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_bpe_vocab(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    found = len(vocab)
    if found < vocab_size:
        logger.warning("the text only has enough for %d of %d BPE entries", found, vocab_size)
    target.mkdir(parents=True, exist_ok=True)
    (target / TOKENIZER_NAME).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (target / _CONFIG_NAME).write_text(json.dumps(_TRAINED_CONFIG, indent=1) + "\n")
    return TokenizerFacts(
        vocab_size=found,
        eos_token_id=vocab[END_OF_TEXT],
        sha256=file_sha256(target / TOKENIZER_NAME),
    )


def check_bpe_vocab(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold every byte.

    Raises:
        ConfigError: too small.
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise ConfigError(
            f"--train-bpe {vocab_size}: at least {MIN_BPE_VOCAB} entries are required, for the 256 "
            f"bytes and {END_OF_TEXT}"
        )


def _load(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # many kinds, of several libraries; all mean the same here
        raise DataError(
            f"{source}: the tokenizer cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"{source}: {type(tokenizer).__name__} has no `tokenizers` (fast) version, which is "
            f"required; convert it to a {TOKENIZER_NAME} first"
        )
    return tokenizer


def _save(tokenizer: Any, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer.save_pretrained(target)
    except Exception as error:  # the Rust library raises a bare Exception for a full disk
        raise DataError(f"{target}: the tokenizer cannot be written ({error})") from error


def _same_tokenizer(file: Path, backend: Any) -> bool:
    from tokenizers import Tokenizer

    if not file.is_file():
        return False
    ours, loaded = (json.loads(t.to_str()) for t in (Tokenizer.from_file(str(file)), backend))
    # transformers adds an empty post-processor on loading; none of these takes part in encoding.
    for part in ("post_processor", "truncation", "padding"):
        ours.pop(part, None)
        loaded.pop(part, None)
    return bool(ours == loaded)


_TRAINED_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1_000_000_000,
}
