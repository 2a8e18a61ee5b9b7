"""Validation loss on fixed batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spectral_scale.data.loader import Batch, ValidationLoader
from spectral_scale.ops.losses import IGNORED, negative_log_likelihood_sum
from spectral_scale.parallel.collective import Collective

Watch = Callable[[Iterable[Batch], int], Iterable[Batch]]
"""Hands on this rank's batches, of which it is told the number, as tqdm does."""


@runtime_checkable
class SumsLosses(Protocol):
    """A model that keeps its logits in parts and sums the losses itself."""

    def token_loss_sum(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Of ids and labels (batch, sequence), a 0-dim tensor of float32 or better."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One pass over the validation batches."""

    loss: float
    """Mean negative log-likelihood a token, nats."""
    tokens: int
    """Tokens predicted, over all ranks."""

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))


def token_loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over tokens of the negative log-likelihood, float32 or better; runs the forward pass."""
    if isinstance(model, SumsLosses):
        return model.token_loss_sum(batch.input_ids, batch.labels)
    return negative_log_likelihood_sum(model(input_ids=batch.input_ids).logits, batch.labels)


def evaluate(
    model: nn.Module,
    loader: ValidationLoader,
    *,
    device: torch.device,
    collective: Collective,
    autocast: torch.dtype | None,
    watch: Watch | None = None,
) -> Evaluation:
    """Loss over the loader's batches of all ranks that see different data, those of `collective`.

    Collective: every rank runs as many forwards.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        count = _equal_count(loader, collective.world_size)
        batches: Iterable[Batch] = _equal_batches(loader, count)
        for batch in watch(batches, count) if watch is not None else batches:
            moved = Batch(batch.input_ids.to(device), batch.labels.to(device))
            totals[0] += token_loss_sum(model, moved).double()
            totals[1] += (moved.labels != IGNORED).sum()
    model.train(was_training)
    loss_sum, tokens = collective.all_reduce_sum(totals).tolist()
    return Evaluation(loss=loss_sum / max(tokens, 1.0), tokens=int(tokens))


def _equal_count(loader: ValidationLoader, world_size: int) -> int:
    """Batches of the rank that has most."""
    largest_share = -(-loader.num_sequences // world_size)
    return -(-largest_share // loader.micro_batch_size)


def _equal_batches(loader: ValidationLoader, count: int) -> Iterator[Batch]:
    """This rank's batches, filled up with unlabelled ones: hosts that shard weights need all ranks
    in every forward pass."""
    yield from loader
    empty = torch.zeros(1, loader.sequence_length, dtype=torch.int64)
    for _ in range(count - len(loader)):
        yield Batch(empty, torch.full_like(empty, IGNORED))
