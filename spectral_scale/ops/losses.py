"""The loss of a language model, as every backend computes it."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from spectral_scale.ops.labels import IGNORED_LABEL


def negative_log_likelihood_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the loss over tokens, as a 0-dim tensor of float32 or better.

    Args:
        logits: shape (batch, sequence, vocabulary).
        labels: token ids or IGNORED_LABEL, shape (batch, sequence).
    """
    flat = logits.flatten(0, -2)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return cross_entropy(flat, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
