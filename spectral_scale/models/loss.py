"""The training loss of a model: its forward pass and the sum over tokens in one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_scale.models.chunked_loss import head_loss_sum
from spectral_scale.models.loss_chunks import chunk_rows
from spectral_scale.ops.losses import negative_log_likelihood_sum


@runtime_checkable
class SumsLosses(Protocol):
    """A model that keeps its logits sharded and therefore sums the losses itself."""

    def token_loss_sum(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of ids and labels (batch, sequence): 0-dim, float32 or better."""


def token_loss_sum(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Run the forward pass and sum the negative log-likelihood over tokens.

    Where the logits of all tokens would be large, head and loss are taken in chunks of tokens.

    Args:
        model: a language model, wrapped or not.
        input_ids: token ids, int64, shape (batch, sequence).
        labels: the token that follows each of them, or IGNORED_LABEL; same shape.

    Returns:
        A 0-dim tensor, float32 or better.
    """
    if isinstance(model, SumsLosses):
        return model.token_loss_sum(input_ids, labels)
    head = plain_head(model)
    if head is not None and labels.numel() > chunk_rows(head.out_features):
        with _sums_losses(head, labels):
            loss: Tensor = model(input_ids=input_ids).logits
            return loss
    return negative_log_likelihood_sum(model(input_ids=input_ids).logits, labels)


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output layer of a transformers model, wrapped or not, that chunks can be taken of: an
    nn.Linear without a bias, as all families have it; else None."""
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    head = None if found is None else found.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    return head


@contextmanager
def _sums_losses(head: nn.Linear, labels: Tensor) -> Iterator[None]:
    """Inside, the head answers hidden states with the loss instead of logits.

    It is called as the module that it is, so that whatever a host hooks to it happens: gathering
    its weight, above all.
    """
    before = vars(head).get("forward")
    instead: Any = lambda hidden: head_loss_sum(hidden, head.weight, labels)  # noqa: E731
    head.forward = instead  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before  # type: ignore[method-assign]
