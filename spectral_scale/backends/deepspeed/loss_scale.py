"""fp16's loss scale: DeepSpeed adapts it; what it has learned is part of a checkpoint."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk

logger = logging.getLogger(__name__)

NAME = "loss_scaler"
"""The name in checkpoints of a float64 tensor of the values of `LEARNED`."""
LEARNED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's DynamicLossScaler: the scale, the steps seen, the last one that
overflowed, and how many more overflows it bears before it halves the scale."""


def all_finite(norms: Mapping[str, Tensor]) -> bool:
    """Whether no gradient overflowed; waits for the device."""
    return bool(torch.stack(list(norms.values())).isfinite().all())


def cannot_lower(scaler: Any) -> bool:
    """Whether another overflow would find no smaller scale. A fixed scale has none either."""
    if not scaler.dynamic:
        return True
    exhausted = 1 in (scaler.delayed_shift, scaler.cur_hysteresis)
    return bool(exhausted and scaler.cur_scale == scaler.min_scale)


def state_chunks(scaler: Any) -> Iterator[TensorChunk]:
    """What one rank saves of a scaler that adapts."""
    if scaler.dynamic:
        values = [float(getattr(scaler, key)) for key in LEARNED]
        yield TensorChunk(NAME, torch.tensor(values, dtype=torch.float64), (len(LEARNED),), (0,))


def load_state(scaler: Any, read: ReadTensor) -> None:
    """Go on with a checkpoint's scale; with the configured one if it was not trained in fp16."""
    if not scaler.dynamic:
        return
    try:
        scale, *counts = read(NAME).tolist()
    except CheckpointError:
        logger.warning("the checkpoint holds no loss scale: it begins at %g", scaler.cur_scale)
        return
    scaler.cur_scale = scale
    for key, value in zip(LEARNED[1:], counts, strict=True):
        setattr(scaler, key, int(value))
