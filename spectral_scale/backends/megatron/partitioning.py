"""How Megatron marks a parameter that tensor parallelism shards, and where the shards lie."""

import torch.distributed as dist
from torch import Tensor

from spectral_scale.parallel.shard_geometry import FlatOrder, Shape


def sharded_dim_of(parameter: Tensor) -> int | None:
    """The dimension along which Megatron's marks say a parameter is sharded; None: whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def flat_place(
    parameter: Tensor, global_shape: Shape, group: dist.ProcessGroup
) -> tuple[FlatOrder, int]:
    """The order in which the shards of a tensor-parallel group lie one after the other, and where
    this rank's shard begins in it."""
    dim = sharded_dim_of(parameter)
    order = FlatOrder(global_shape, group.size() if dim == 1 else 1)
    return order, 0 if dim is None else group.rank() * parameter.numel()
