"""Columns of many matrices scaled by few operations: launches grow with shapes, not with matrices.

On a GPU an operation on a small matrix takes as long as its launch. Matrices of one shape are
therefore copied into one stack, worked on together, and copied back by one multi-tensor copy; a
stack has a largest size, so that the copy costs little memory beside the model. Each column's
numbers are those that the same operation gives for its matrix alone.
"""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

MAX_ELEMENTS = 1 << 24
"""Elements of a stack (64 MiB in fp32), unless a single tensor has more."""


def alike(tensors: Sequence[Tensor], kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Places of tensors of one shape, dtype, device and kind; too large a group is cut in parts.

    Where ranks hold shards, `kinds` must tell them apart as other ranks do: the places, group after
    group, are then in the same order on all of them.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kind = None if kinds is None else kinds[i]
        groups.setdefault((kind, tensor.shape, tensor.dtype, tensor.device), []).append(i)
    parts: list[list[int]] = []
    for places in groups.values():
        at_once = max(1, MAX_ELEMENTS // max(1, tensors[places[0]].numel()))
        parts += [places[i : i + at_once] for i in range(0, len(places), at_once)]
    return parts


def column_norms(factors: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Lengths of the columns of matrices: for each group of `alike`, (matrices, columns)."""
    return [torch.linalg.vector_norm(stack(factors, group), dim=1) for group in groups]


def divide_columns(
    factors: Sequence[Tensor], groups: Sequence[Sequence[int]], lengths: Sequence[Tensor]
) -> None:
    """Divide columns by their lengths, as `column_norms` gives them, in place.

    A column of zeros stays as it is.
    """
    for group, length in zip(groups, lengths, strict=True):
        _divide(factors, group, stack(factors, group), length)


def unit_columns(factors: Sequence[Tensor], *, unless: Tensor | None = None) -> None:
    """Scale the columns of whole matrices to unit length, in place.

    Args:
        factors: matrices (rows, columns), of which the columns are scaled.
        unless: a 0-dim bool on their device; if true, nothing changes.
    """
    for group in alike(factors):
        whole = stack(factors, group)
        (length,) = keep_if(unless, [torch.linalg.vector_norm(whole, dim=1)])
        _divide(factors, group, whole, length)


def keep_if(unless: Tensor | None, lengths: list[Tensor]) -> list[Tensor]:
    """Lengths to divide by, which are 1 and so change no bit if `unless` is true, in place."""
    if unless is not None:
        for length in lengths:
            length.masked_fill_(unless, 1.0)
    return lengths


def _divide(factors: Sequence[Tensor], group: Sequence[int], whole: Tensor, length: Tensor) -> None:
    divisors = length.clamp_min(torch.finfo(length.dtype).tiny).unsqueeze(1)
    torch._foreach_copy_([factors[i] for i in group], whole.div_(divisors).unbind())


def stack(tensors: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    """A copy of the tensors at a group's places, along a new first dimension."""
    return torch.stack([tensors[i].detach() for i in group])


def raise_to_zero(tensors: Iterable[Tensor]) -> None:
    """Raise negative entries to zero, in place."""
    kept = [tensor.detach() for tensor in tensors]
    if kept:
        torch._foreach_clamp_min_(kept, 0)
