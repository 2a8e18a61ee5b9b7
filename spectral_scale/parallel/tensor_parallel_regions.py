"""The two collectives between which a tensor-parallel layer works, as differentiable functions.

Megatron-LM's f and g (arXiv 1909.08053, section 3): one is the identity forward and a sum backward,
the other the reverse.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, as a new tensor; not differentiable. Collective."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(y, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, equal on every rank; its gradient is the sum of the ranks'. Collective in backward."""
    result: Tensor = _CopyToRegion.apply(x, group)
    return result


def leave(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' y; each gets the gradient of the sum. Collective in forward."""
    result: Tensor = _ReduceFromRegion.apply(y, group)
    return result
