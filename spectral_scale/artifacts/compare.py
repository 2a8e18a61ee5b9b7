"""Checks that two models are the same function by their logits on the same tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectral_scale.data.loader import ValidationLoader
from spectral_scale.data.tokens import TokenFolder
from spectral_scale.errors import SpectralScaleError
from spectral_scale.ops.keyed_random import keyed_generator

RELATIVE_TOLERANCE = 5e-5
"""Largest difference of two logits, as a fraction of the largest |logit|: about 400 roundings of
float32. Rounding alone gave 1e-6 (12 layers of width 768, weights as initialised) to 1.5e-5 (the
same model with weights four times as large)."""
MAX_SEQUENCES = 4
MAX_POSITIONS = 1024


@dataclass(frozen=True, kw_only=True)
class LogitsDifference:
    """How far apart two models' logits are."""

    max_abs: float
    """Largest absolute difference; NaN if a logit is not finite."""
    largest: float
    """Largest |logit| of the reference."""
    positions: int
    """Tokens the logits were taken at."""

    @property
    def tolerance(self) -> float:
        """The largest difference that float32 rounding explains."""
        return RELATIVE_TOLERANCE * self.largest

    @property
    def within(self) -> bool:
        """Whether rounding explains the difference; never for logits that are not finite."""
        return self.max_abs <= self.tolerance


def comparison_ids(tokens: TokenFolder | None, *, sequence_length: int, vocab_size: int) -> Tensor:
    """Token ids (B, S) to compare on: sequences spread over a token folder, or keyed random ones.

    At most 4 sequences and about 1,024 positions, so that the logits of a large vocabulary fit.
    """
    count = max(1, min(MAX_SEQUENCES, MAX_POSITIONS // sequence_length))
    if tokens is None:
        generator = keyed_generator("comparison", count, sequence_length, vocab_size)
        return torch.randint(vocab_size, (count, sequence_length), generator=generator)
    batches = ValidationLoader(
        tokens, sequence_length=sequence_length, num_sequences=count, micro_batch_size=count
    )
    return next(iter(batches)).input_ids


@torch.no_grad()
def compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, S, V) on the CPU, in the weights' precision, in evaluation mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = [model(input_ids=row[None].to(device)).logits.cpu() for row in ids]
    model.train(was_training)
    return torch.cat(logits)


def compare_logits(reference: Tensor, other: Tensor) -> LogitsDifference:
    """Compare logits of one shape (B, S, V)."""
    finite = bool(reference.isfinite().all()) and bool(other.isfinite().all())
    difference = (reference - other.to(reference.dtype)).abs().max()
    return LogitsDifference(
        max_abs=float(difference) if finite else math.nan,
        largest=float(reference.abs().max()),
        positions=reference.shape[0] * reference.shape[1],
    )


def require_same(difference: LogitsDifference, what: str) -> None:
    """Raise SpectralScaleError unless rounding explains the difference."""
    if not difference.within:
        raise SpectralScaleError(
            f"{what}: logits differ by up to {difference.max_abs:.3g} at {difference.positions} "
            f"positions; float32 rounding explains at most {difference.tolerance:.3g} "
            f"({RELATIVE_TOLERANCE:g} of the largest logit, {difference.largest:.3g})"
        )
