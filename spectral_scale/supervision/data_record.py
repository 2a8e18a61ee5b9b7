"""Which data a step read, so that people can look at what could not be learned from."""

from typing import Any

import numpy as np

from spectral_scale.data.loader import TrainLoader

MAX_SAMPLES = 64
"""Samples of a step that are named; the rest follows from `data_step`."""


def data_of(loader: TrainLoader, data_step: int) -> dict[str, Any]:
    """Which samples and documents a step's global batch holds.

    `documents` are the numbers of the documents in which the samples begin, `token_offsets` where
    the samples begin in the token stream.
    """
    samples = loader.sample_ids(data_step)[:MAX_SAMPLES]
    offsets = samples * loader.sequence_length
    starts = loader.folder.document_starts
    documents = np.searchsorted(starts, offsets, side="right") - 1
    return {
        "data_step": data_step,
        "samples": samples.tolist(),
        "token_offsets": offsets.tolist(),
        "documents": documents.tolist(),
    }
