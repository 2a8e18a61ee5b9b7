"""The loss of a language model, as every host computes it."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100
"""Label of a token that no loss counts."""


def negative_log_likelihood_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens, 0-dim, float32 or better, of logits (batch, sequence, vocabulary) and labels
    (batch, sequence)."""
    flat = logits.flatten(0, -2)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
