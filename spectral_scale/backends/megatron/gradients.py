"""Gradients under tensor parallelism: what is summed when, and whose norm counts."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_scale.backends.megatron.matrix import PARTIAL
from spectral_scale.parallel.packing import by_dtype, unpack


@torch.no_grad()
def sum_partial_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> int:
    """Sum over tensor-parallel ranks what `completion="per_step"` left partial, in place.

    Once a step, after data-parallel ranks have been summed (`finalize_model_grads`). One message a
    dtype. Collective over `group`. Returns the elements summed, 0 if nothing is partial.
    """
    if group.size() == 1:
        return 0
    marked = [p for p in parameters if getattr(p, PARTIAL, False)]
    gradients = [g for p in marked if (g := gradient(p)) is not None]
    for packet in by_dtype(gradients):
        flat = torch.cat([g.reshape(-1) for g in packet])
        dist.all_reduce(flat, group=group)
        unpack(flat, packet)
    return sum(g.numel() for g in gradients)


def gradient(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient: `main_grad` where Megatron accumulates into it, else `grad`."""
    main: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if main is None else main


def counted_squares(
    parameters: Iterable[Tensor], *, tensor_rank: int, device: torch.device
) -> Tensor:
    """This rank's share of the squared norm of `.grad`: whole parameters count on rank 0 only.

    float64, so that the order of the sum over ranks does not show; 0-dim.
    """
    kept = [
        p.grad
        for p in parameters
        if p.grad is not None and (getattr(p, "tensor_model_parallel", False) or tensor_rank == 0)
    ]
    if not kept:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(kept).double().square()
