"""The training loss of a model: its forward pass and the sum over tokens in one call."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from spectral_scale.ops.losses import negative_log_likelihood_sum


@runtime_checkable
class SumsLosses(Protocol):
    """A model that keeps its logits sharded and therefore sums the losses itself."""

    def token_loss_sum(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of ids and labels (batch, sequence): 0-dim, float32 or better."""


def token_loss_sum(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Run the forward pass and sum the negative log-likelihood over tokens.

    Args:
        model: a language model, wrapped or not.
        input_ids: token ids, int64, shape (batch, sequence).
        labels: the token that follows each of them, or IGNORED_LABEL; same shape.

    Returns:
        A 0-dim tensor, float32 or better.
    """
    if isinstance(model, SumsLosses):
        return model.token_loss_sum(input_ids, labels)
    return negative_log_likelihood_sum(model(input_ids=input_ids).logits, labels)
