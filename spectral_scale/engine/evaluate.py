"""Validation loss on fixed batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from spectral_scale.data.loader import Batch, ValidationLoader
from spectral_scale.models.loss import token_loss_sum
from spectral_scale.ops.labels import IGNORED_LABEL
from spectral_scale.parallel.collective import Collective

Watch = Callable[[Iterable[Batch], int], Iterable[Batch]]
"""Passes this rank's batches through, given their number, and shows progress as tqdm does."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One pass over the validation batches."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    tokens: int
    """Number of tokens predicted, over all ranks."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: nn.Module,
    loader: ValidationLoader,
    *,
    device: torch.device,
    collective: Collective,
    autocast: torch.dtype | None,
    watch: Watch | None = None,
) -> Evaluation:
    """Mean loss over the batches of all ranks of `collective`. Collective.

    Every rank runs the same number of forward passes.

    Args:
        model: what the training forward is called on; its mode is restored.
        loader: this rank's batches.
        device: where the model is.
        collective: the ranks that see different data.
        autocast: compute dtype of the forward pass, if it differs from the weights'.
        watch: shows progress.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        count = _equal_count(loader, collective.world_size)
        batches: Iterable[Batch] = _equal_batches(loader, count)
        for batch in watch(batches, count) if watch is not None else batches:
            moved = Batch(batch.input_ids.to(device), batch.labels.to(device))
            totals[0] += token_loss_sum(model, *moved).double()
            totals[1] += (moved.labels != IGNORED_LABEL).sum()
    model.train(was_training)
    loss_sum, tokens = collective.all_reduce_sum(totals).tolist()
    return Evaluation(loss=loss_sum / max(tokens, 1.0), tokens=int(tokens))


def _equal_count(loader: ValidationLoader, world_size: int) -> int:
    """The number of batches of the rank that has most."""
    most_sequences = -(-loader.num_sequences // world_size)
    return -(-most_sequences // loader.micro_batch_size)


def _equal_batches(loader: ValidationLoader, count: int) -> Iterator[Batch]:
    """This rank's batches, filled up to `count` with batches that have no labels.

    A backend that shards weights needs all ranks in every forward pass.
    """
    yield from loader
    empty = torch.zeros(1, loader.sequence_length, dtype=torch.int64)
    for _ in range(count - len(loader)):
        yield Batch(empty, torch.full_like(empty, IGNORED_LABEL))
