"""Small token folders made directly with the writer."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from spectral_scale.data.token_index import TokenIndex
from spectral_scale.data.tokens import TokenFolder, open_tokens
from spectral_scale.data.writer import TokenWriter, write_index

EOS = 0


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., TokenFolder]:
    """make_folder(documents, name=..., vocab_size=..., shard_tokens=...) -> TokenFolder."""

    def make(
        documents: Sequence[Sequence[int]],
        *,
        name: str = "tokens",
        vocab_size: int = 1000,
        shard_tokens: int = 1 << 20,
    ) -> TokenFolder:
        folder = tmp_path / name
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer/tokenizer.json").write_text("{}")
        writer = TokenWriter(
            folder, vocab_size=vocab_size, eos_token_id=EOS, shard_tokens=shard_tokens
        )
        for document in documents:
            writer.append(document)
        index = TokenIndex(
            vocab_size=vocab_size,
            eos_token_id=EOS,
            shards=writer.close(),
            tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
            skipped={},
            request={},
            created_by="tests",
        )
        write_index(folder, index)
        return open_tokens(folder)

    return make


@pytest.fixture
def counting_folder(make_folder: Callable[..., TokenFolder]) -> Callable[[int], TokenFolder]:
    """counting_folder(n): n tokens 1, 2, ..., n - 1 and the end-of-text token."""

    def make(num_tokens: int) -> TokenFolder:
        document = np.arange(1, num_tokens)
        return make_folder([document], name=f"counting_{num_tokens}", vocab_size=num_tokens + 1)

    return make
