"""Pieces of sharded tensors: their geometry is torch's, and what cannot be served is refused."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.dtensor_layout import (
    DTensorLayout,
    DTensorLayouts,
    ShardedDim,
    ceil_shard,
)
from spectral_scale.parallel.group import join_alone
from spectral_scale.parallel.shard_geometry import tiling_fault
from spectral_scale.parallel.store import TorchStore


def layout(dim: int | None, parts: int, index: int) -> DTensorLayout:
    """Piece `index` of `parts`, without groups."""
    ranks = tuple(range(parts))
    return DTensorLayout(
        sharded_dims=() if dim is None else (ShardedDim(dim, parts, 1),),
        shard_ranks=ranks,
        shard_group=None,
        replica_ranks=(index,),
        replica_group=None,
        replica_of=dict.fromkeys(ranks, 0),
        shard_of={rank: rank for rank in ranks},
        rank=index,
    )


@given(st.integers(0, 40), st.integers(1, 9))
def test_shards_are_those_of_torch(size: int, parts: int) -> None:
    for index in range(parts):
        start, length = ceil_shard(size, parts, index)
        shape, offset = _compute_local_shape_and_global_offset(
            (size, 3), (parts,), lambda _, i=index: i, (Shard(0),)
        )
        assert length == shape[0]
        assert length == 0 or start == offset[0]


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(0, 1))
def test_shards_tile_the_tensor(rows: int, columns: int, parts: int, dim: int) -> None:
    boxes = [layout(dim, parts, i).rectangle((rows, columns)) for i in range(parts)]
    assert tiling_fault([b for b in boxes if b.numel], (rows, columns)) is None
    assert boxes[0].shape == layout(dim, parts, parts - 1).padded_shape((rows, columns))


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_equal_shards_sharded_again_tile_the_tensor(
    rows: int, columns: int, tensor: int, data: int, other: bool
) -> None:
    """Sharded by tensor parallelism first, then as `fully_shard` does it: torch's shards."""
    shape = (rows * tensor, columns)
    ranks = tuple(range(data * tensor))
    dim = 1 if other else 0
    cuts = (ShardedDim(0, tensor, 1), ShardedDim(dim, data, tensor))
    placements = (Shard(1) if other else _StridedShard(0, split_factor=tensor), Shard(0))
    whole = DTensorLayout(
        cuts, ranks, None, (0,), None, dict.fromkeys(ranks, 0), {r: r for r in ranks}, 0
    )
    boxes = [whole.rectangle(shape, i) for i in ranks]
    assert tiling_fault([b for b in boxes if b.numel], shape) is None
    for rank, box in enumerate(boxes):
        at = divmod(rank, tensor)
        local, offset = _compute_local_shape_and_global_offset(
            shape, (data, tensor), lambda axis, at=at: at[axis], placements
        )
        assert tuple(local) == box.shape
        assert not box.numel or tuple(offset) == box.offset


def test_a_tensor_that_is_not_sharded_is_one_shard() -> None:
    assert layout(None, 1, 0).rectangle((3, 4)).shape == (3, 4)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    join_alone(torch.device("cpu"))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "placements", [(Shard(0), Shard(0)), (Partial(), Shard(0)), (Partial(), Replicate())], ids=str
)
def test_other_placements_are_refused(group: None, placements: tuple[Any, ...]) -> None:
    mesh = init_device_mesh("cpu", (1, 1))
    tensor = DTensor.from_local(torch.ones(4, 4), mesh, placements)
    with pytest.raises(ConfigError, match="sharded along one mesh dimension"):
        DTensorLayouts().of(tensor)


def test_layouts_are_found_once_for_each_placement(group: None) -> None:
    mesh = init_device_mesh("cpu", (1, 1))
    layouts = DTensorLayouts()
    a, b, c = (
        DTensor.from_local(torch.ones(4, 4), mesh, p)
        for p in ((Replicate(), Shard(0)), (Replicate(), Shard(0)), (Replicate(), Shard(1)))
    )
    assert layouts.of(a) is layouts.of(b)
    assert layouts.of(c) is not layouts.of(a)
    assert (layouts.of(a).dim, layouts.of(c).dim) == (0, 1)
    assert layouts.of(a).is_first_replica


def test_a_store_of_whole_parameters_refuses_shards(group: None) -> None:
    """Plain writes to a sharded model would fail late, or be lost."""
    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, (Shard(0),)))
    model: Any = SimpleNamespace(named_parameters=lambda: [("weight", weight)])
    with pytest.raises(ConfigError, match="store=FSDP2Store"):
        TorchStore(model, None, SingleProcess())
