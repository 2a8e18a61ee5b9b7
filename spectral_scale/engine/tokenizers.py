"""Whether token ids mean to a model what they mean in the data."""

import logging
import tempfile
from pathlib import Path
from typing import Literal

from spectral_scale.data.tokenizer import find_tokenizer, install_tokenizer
from spectral_scale.data.tokens import TOKENIZER_NAME, TokenFolder, file_sha256
from spectral_scale.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TokenizerCheck = Literal["same", "not checked"]
"""Whether a model's tokenizer was held against the data's; a different one is an error."""


def require_tokenizer(tokens: TokenFolder, sha256: str | None, *, owner: str) -> None:
    """Raise ConfigError unless a token folder's ids are those of `owner`'s tokenizer."""
    if sha256 is not None and tokens.tokenizer_sha256 != sha256:
        raise ConfigError(
            f"{owner} has the tokenizer {sha256[:16]}..., but {tokens.path} was prepared with "
            f"{tokens.tokenizer_sha256[:16]}... (sha256 of {TOKENIZER_NAME}): its ids mean other "
            "text; prepare the data with the model's tokenizer"
        )


def check_folder_tokenizer(folder: Path, tokens: TokenFolder) -> TokenizerCheck:
    """Hold a transformers folder's tokenizer against the data's.

    Returns "not checked", with a warning, if the folder has none that can be loaded. Raises
    ConfigError, naming both, if they differ.
    """
    file = folder / TOKENIZER_NAME
    if file.is_file() and file_sha256(file) == tokens.tokenizer_sha256:
        return "same"
    try:
        with tempfile.TemporaryDirectory() as scratch:  # as `prepare` would have stored it
            target = Path(scratch) / "tokenizer"
            sha256 = install_tokenizer(find_tokenizer(folder), target).sha256
    except DataError as error:
        logger.warning("the data's tokenizer cannot be held against the model's: %s", error)
        return "not checked"
    require_tokenizer(tokens, sha256, owner=str(folder))
    return "same"
