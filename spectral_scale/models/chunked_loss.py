"""The loss of a language model from its last hidden states, without the logits of all tokens.

Logits in full precision are the largest tensor of a step: 8192 tokens of 50k words are 1.6 GB, and
the loss, its gradient and the softmax each have their own. Here head, loss and gradient are taken
chunk by chunk of tokens. The gradients of hidden states and of the head's weight are computed with
the loss, so that no chunk's logits are needed twice; backward multiplies them by the loss's own
gradient. In fp16 that gradient (the loss scale) must come before values are rounded, so backward
computes the logits again there.

Shape suffixes: T tokens, H hidden features, V words of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import nll_loss

from spectral_scale.models.loss_chunks import chunk_sizes
from spectral_scale.ops.autocast import product_dtype
from spectral_scale.ops.labels import IGNORED_LABEL


def head_loss_sum(hidden: Tensor, weight_VH: Tensor, labels: Tensor) -> Tensor:
    """Sum the loss over tokens, as a 0-dim tensor of float32 or better.

    The products' dtype is autocast's where autocast is on. One backward pass only.

    Args:
        hidden: shape (batch, sequence, H).
        weight_VH: of the head, which has no bias.
        labels: token ids or IGNORED_LABEL, shape (batch, sequence).
    """
    rows, words = hidden.flatten(0, -2), labels.flatten()
    dtype, with_gradients = product_dtype(hidden), torch.is_grad_enabled()
    loss: Tensor = _HeadLoss.apply(rows, weight_VH, words, dtype, with_gradients)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> Tensor:
        """The loss; the gradients, too, if they are wanted and may be computed already."""
        wanted = ctx.needs_input_grad[:2] if with_gradients else (False, False)
        ctx.dtype, ctx.wanted, ctx.done = dtype, wanted, False
        ctx.again = dtype == torch.float16 and any(wanted)
        ctx.kept = None
        if ctx.again:
            ctx.save_for_backward(hidden_TH, weight_VH, labels_T)
            return _loss_and_gradients(hidden_TH, weight_VH, labels_T, dtype, (False, False))[0]
        loss, *ctx.kept = _loss_and_gradients(hidden_TH, weight_VH, labels_T, dtype, wanted)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and weight."""
        if ctx.done:
            raise RuntimeError("a loss taken in chunks has one backward pass; compute it again")
        ctx.done = True
        if ctx.again:
            hidden, weight, labels = ctx.saved_tensors
            _, *found = _loss_and_gradients(
                hidden, weight, labels, ctx.dtype, ctx.wanted, scale=grads[0]
            )
        else:
            found, ctx.kept = ctx.kept, None
            found = [None if t is None else t.mul_(grads[0]) for t in found]
        return (*found, None, None, None)


def _loss_and_gradients(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the wanted gradients of hidden states and weight, times `scale`."""
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden_TH.device)
    d_hidden = torch.empty_like(hidden_TH) if wanted[0] else None
    d_weight = torch.zeros_like(weight_VH, dtype=wide) if wanted[1] else None
    weight = weight_VH.to(dtype)
    for rows in _chunks(len(labels_T), len(weight_VH)):
        hidden, labels = hidden_TH[rows].to(dtype), labels_T[rows]
        logs = torch.log_softmax(hidden @ weight.t(), -1, dtype=wide)
        total += nll_loss(logs, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        if not any(wanted):
            continue
        d_logits = _d_logits(logs, labels, scale, dtype)
        del logs
        if d_hidden is not None:
            d_hidden[rows] = d_logits @ weight
        if d_weight is not None:
            _add_product(d_weight, d_logits.t(), hidden)
    return total, d_hidden, None if d_weight is None else d_weight.to(weight_VH.dtype)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    start = 0
    for size in chunk_sizes(tokens, vocabulary):
        yield slice(start, start + size)
        start += size


def _d_logits(
    logs_TV: Tensor, labels_T: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """softmax - one-hot, zero where no label counts; the logarithms become the softmax."""
    softmax = logs_TV.exp_()
    word = labels_T.clamp_min(0)[:, None]
    softmax.scatter_(1, word, softmax.gather(1, word) - 1)
    counted = (labels_T != IGNORED_LABEL).to(softmax.dtype)[:, None]
    factor = counted if scale is None else counted * scale
    return torch.mul(softmax, factor, out=torch.empty_like(softmax, dtype=dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, rounded to total's dtype only."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
