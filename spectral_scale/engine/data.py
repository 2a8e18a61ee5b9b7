"""The run's token folders, and what they say about the vocabulary."""

from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.data.embedded import embedded_corpus
from spectral_scale.data.tokens import TokenFolder, open_tokens
from spectral_scale.errors import ConfigError

EMBEDDED = "embedded"
VOCABULARY_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this, which makes matrix products faster."""


def open_data(config: RunConfig) -> tuple[TokenFolder, TokenFolder | None]:
    """Open the training and validation folders; prepare the embedded corpus on first use."""
    train, validation = config.data.train, config.data.validation
    if train == EMBEDDED:
        train_path, held_out = embedded_corpus()
        train, validation = str(train_path), validation or str(held_out)
    train_tokens = open_tokens(train)
    if validation is None:
        return train_tokens, None
    validation_tokens = open_tokens(validation)
    if validation_tokens.tokenizer_sha256 != train_tokens.tokenizer_sha256:
        raise ConfigError(
            f"data.train={train} and data.validation={validation} were prepared with different "
            "tokenizers; prepare both with the same one"
        )
    return train_tokens, validation_tokens


def with_vocabulary(run: ResolvedRun, tokens: TokenFolder) -> ResolvedRun:
    """Resolve `model.vocab_size: auto` from the data, and refuse one the data does not fit."""
    model, needed = run.config.model, tokens.vocab_size
    if model.path is not None:
        return run
    if model.vocab_size == "auto":
        return run.with_vocabulary(-(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    check_vocabulary(model.vocab_size, tokens)
    return run


def check_vocabulary(rows: int, tokens: TokenFolder) -> None:
    """Raise ConfigError unless every token id has an embedding row."""
    if rows < tokens.vocab_size:
        raise ConfigError(
            f"the model's vocabulary has {rows} rows, but {tokens.path} holds token ids up to "
            f"{tokens.vocab_size - 1}; set model.vocab_size to auto or at least "
            f"{tokens.vocab_size}, or prepare the data with the model's tokenizer"
        )
