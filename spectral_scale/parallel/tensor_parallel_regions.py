"""The two ends of a tensor-parallel region, as differentiable functions.

Megatron-LM's f and g (arXiv 1909.08053, section 3): `copy_to_region` is the identity forward and a
sum over ranks backward, `reduce_from_region` the reverse. With x = 3 on both of two ranks whose
column-parallel weights are 10 and 20, the outputs are 30 and 60. For a gradient of 1 of each output
the ranks find dL/dx = 10 and 20, each its own outputs' part; the sum, 30, is the gradient of x on
both.

Invariant: outside the region, activations and their gradients are equal on all ranks of the
tensor-parallel group.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, as a new tensor; not differentiable. Collective."""
    return start_all_reduce(tensor, group)()


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start `all_reduce` of the tensor's present values; what this returns waits for the sum."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(result, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return result

    return finish


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


def copy_to_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x, equal on every rank; its gradient is summed over ranks. Collective in backward."""
    result: Tensor = _CopyToRegion.apply(x, group)
    return result


def reduce_from_region(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum y over ranks; each rank gets the gradient of the sum. Collective in forward."""
    result: Tensor = _ReduceFromRegion.apply(y, group)
    return result
