"""Pieces of DTensors: which cuts can be flattened, and what is said of the others."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.flat_shards import TensorShards
from spectral_scale.testing.distributed import run_distributed

CUTS: list[tuple[tuple[int, ...], int]] = [((4, 6), 0), ((4, 6), 1), ((4, 7), 1), ((2, 2, 4), 2)]
"""Shape of a tensor, and the dimension that two ranks shard."""


def held_ranges() -> list[object]:
    """What each rank holds of the tensors, or why it cannot be said."""
    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (2,)), []
    for shape, dim in CUTS:
        tensor = distribute_tensor(torch.zeros(shape), mesh, [Shard(dim)])
        try:
            found.append(TensorShards({"fc.weight": tensor}).ranges("fc.weight"))
        except ConfigError as error:
            found.append(str(error))
    dist.destroy_process_group()
    return found


def test_rows_and_equal_blocks_of_columns_are_ranges_and_other_shards_are_refused() -> None:
    for rows, columns, unequal, deep in run_distributed(held_ranges, 2):
        assert rows == columns == [(0, 12), (12, 12)]
        assert "fc.weight has 7 columns, which 2 ranks do not divide" in unequal
        assert "fc.weight of shape (2, 2, 4) is sharded along dimension 2" in deep
        assert "leave out shard_placement_fn" in deep
