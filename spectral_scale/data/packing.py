"""Cutting a token stream into samples of sequence_length + 1 tokens (inputs and shifted labels).

Sample i holds tokens [i S, i S + S]: neighbours share one token, so that every token but the
first is predicted exactly once an epoch. Documents follow one another without padding.

With S = 4, a stream of 10 tokens has two samples: tokens 0 to 4, of which 1 to 4 are predicted, and
tokens 4 to 8, of which 5 to 8 are predicted. Token 9 is the remainder.
"""

import numpy as np

from spectral_scale.data.tokens import TokenFolder
from spectral_scale.errors import DataError
from spectral_scale.ops.labels import IGNORED_LABEL


def count_samples(folder: TokenFolder, sequence_length: int, *, keep_tail: bool = False) -> int:
    """Samples in a folder; the remainder is dropped, or kept as one padded sample.

    Raises:
        DataError: not one sample.
    """
    predicted = folder.num_tokens - 1
    count = -(-predicted // sequence_length) if keep_tail else predicted // sequence_length
    if count < 1:
        required = 2 if keep_tail else sequence_length + 1
        raise DataError(
            f"{folder.path}: {folder.num_tokens} tokens, at least {required} are required for one "
            f"sequence of {sequence_length}; prepare more text or shorten model.sequence_length"
        )
    return count


def read_samples(folder: TokenFolder, ids: np.ndarray, sequence_length: int) -> np.ndarray:
    """The tokens of samples that are whole.

    Args:
        folder: the token stream.
        ids: sample numbers, shape (B,).
        sequence_length: S.

    Returns:
        int64 array of shape (B, S + 1).
    """
    out = np.empty((len(ids), sequence_length + 1), dtype=np.int64)
    for row, sample in enumerate(ids):
        start = int(sample) * sequence_length
        out[row] = folder.read(start, start + sequence_length + 1)
    return out


def read_padded(
    folder: TokenFolder, ids: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of which the last of the folder may be short.

    Returns:
        (inputs, labels), int64 of shape (B, S); where there is no token, the input is the
        end-of-text token and the label is IGNORED_LABEL.
    """
    inputs = np.full((len(ids), sequence_length), folder.eos_token_id, dtype=np.int64)
    labels = np.full((len(ids), sequence_length), IGNORED_LABEL, dtype=np.int64)
    for row, sample in enumerate(ids):
        start = int(sample) * sequence_length
        tokens = folder.read(start, min(start + sequence_length + 1, folder.num_tokens))
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, : len(tokens) - 1] = tokens[1:]
    return inputs, labels
