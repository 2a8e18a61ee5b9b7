"""Checks that a model and its data assign the same meaning to token ids."""

import logging
from pathlib import Path
from typing import Literal

from spectral_scale.data.tokenizer import find_tokenizer, is_same_tokenizer
from spectral_scale.data.tokens import TOKENIZER_NAME, TokenFolder, file_sha256
from spectral_scale.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TokenizerCheck = Literal["same", "not checked"]
"""Result of comparing the model's tokenizer with the data's; a different one is an error."""


def require_tokenizer(tokens: TokenFolder, sha256: str | None, *, owner: str) -> None:
    """Raise ConfigError unless a token folder's tokenizer has the checksum that `owner` has."""
    if sha256 is not None and tokens.tokenizer_sha256 != sha256:
        raise _different(owner, tokens)


def check_folder_tokenizer(folder: Path, tokens: TokenFolder) -> TokenizerCheck:
    """Hold a transformers folder's tokenizer against the data's, by content.

    Returns "not checked", with a warning, if the folder has none that can be loaded. Raises
    ConfigError, naming both, if they differ.
    """
    file = folder / TOKENIZER_NAME
    if file.is_file() and file_sha256(file) == tokens.tokenizer_sha256:
        return "same"
    try:
        same = is_same_tokenizer(find_tokenizer(folder), tokens.tokenizer_path)
    except DataError as error:
        logger.warning("the data's tokenizer cannot be held against the model's: %s", error)
        return "not checked"
    if not same:
        raise _different(str(folder), tokens)
    return "same"


def _different(owner: str, tokens: TokenFolder) -> ConfigError:
    return ConfigError(
        f"{owner} and {tokens.path} have different tokenizers (the data's {TOKENIZER_NAME} has "
        f"sha256 {tokens.tokenizer_sha256[:16]}...), so ids mean other text; prepare the data with "
        "the model's tokenizer: spectral-scale prepare --tokenizer FOLDER ..."
    )
