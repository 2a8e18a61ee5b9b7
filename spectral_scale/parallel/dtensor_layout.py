"""Where the shards of a DTensor lie: which rectangle of the logical tensor each rank holds.

`fully_shard` splits a tensor along one dimension into shards of ceil(size / ranks) entries; the
last ones may be shorter or empty. 5 rows over 3 ranks give ceil(5 / 3) = 2 rows a shard:

    rank 0: rows 0, 1      rank 1: rows 2, 3      rank 2: row 4

and 3 rows over 4 ranks leave the last rank an empty shard. Padded to the longest shard, all have
the same shape, which is what gather and scatter need on the wire (`padded_shape`).

HSDP replicates what it shards. On a 2 x 2 mesh of ranks 0 .. 3, the first mesh dimension
replicates and the second shards:

                  shard 0   shard 1
    replica 0     rank 0    rank 1      shard_ranks of rank 3:    (2, 3), a row
    replica 1     rank 2    rank 3      replica_ranks of rank 3:  (1, 3), a column

Tensor parallelism splits first, into equal shards, and `fully_shard` splits each of them again:
8 rows over 2 tensor-parallel and 2 data-parallel ranks, the tensor-parallel mesh dimension last.

    tensor-parallel rank 0: rows 0 .. 3    data-parallel rank 0: rows 0, 1   rank 1: rows 2, 3
    tensor-parallel rank 1: rows 4 .. 7    data-parallel rank 0: rows 4, 5   rank 1: rows 6, 7

The global ranks 0 .. 3 of that mesh hold rows 0-1, 4-5, 2-3 and 6-7: `sharded_dims` lists the
splits in the order in which they are made, and each one's `stride` says which part of a rank's
index decides it.

Invariant: the rectangles of the shards of one replica tile the tensor.
"""

from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import Rectangle, Shape


@dataclass(frozen=True)
class ShardedDim:
    """One split of a tensor into shards along a dimension."""

    dim: int
    """Dimension of the tensor."""
    num_shards: int
    """Shards along that dimension."""
    stride: int
    """How far apart, among all shards of the tensor, two neighbours of this split are: shard i of
    the tensor is shard (i // stride) % num_shards of this split."""


@dataclass(frozen=True, eq=False)
class DTensorLayout:
    """How one kind of tensor is sharded over ranks; one object for all tensors sharded alike."""

    sharded_dims: tuple[ShardedDim, ...]
    """The splits in the order they are made, each within the shard that the one before left; empty
    if every rank holds the tensor whole."""
    shard_ranks: tuple[int, ...]
    """Global ranks that hold the shards of this replica, in the order of the shards."""
    shard_group: dist.ProcessGroup | None
    """The process group of `shard_ranks`; None if there is one shard."""
    replica_ranks: tuple[int, ...]
    """Global ranks that hold the same shard as this one, by replica."""
    replica_group: dist.ProcessGroup | None
    """The process group of `replica_ranks`; None if there is one replica."""
    replica_of: dict[int, int]
    """Global rank -> the replica that it belongs to."""
    shard_of: dict[int, int]
    """Global rank -> the shard that it holds."""
    rank: int
    """Global rank of this process."""

    @property
    def dim(self) -> int | None:
        """The sharded dimension; None if there is none. Raises ConfigError if there are two."""
        dims = {sharded.dim for sharded in self.sharded_dims}
        if len(dims) > 1:
            raise ConfigError(
                f"a tensor is sharded along dimensions {sorted(dims)}; one is required"
            )
        return next(iter(dims), None)

    @property
    def num_shards(self) -> int:
        """Shards of one replica."""
        return len(self.shard_ranks)

    @property
    def shard_index(self) -> int:
        """The shard that this rank holds."""
        return self.shard_ranks.index(self.rank)

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank's replica is the one that checkpoints are written from."""
        return self.replica_of[self.rank] == 0

    def rectangle(self, global_shape: Shape, index: int | None = None) -> Rectangle:
        """The rectangle of the logical tensor that a shard (by default this rank's) covers."""
        where = self.shard_index if index is None else index
        offset, shape = [0] * len(global_shape), list(global_shape)
        for split in self.sharded_dims:
            within = where // split.stride % split.num_shards
            start, length = ceil_shard(shape[split.dim], split.num_shards, within)
            offset[split.dim] += start
            shape[split.dim] = length
        return Rectangle(tuple(offset), tuple(shape))

    def padded_shape(self, global_shape: Shape) -> Shape:
        """Shape of the longest shard, which is always the first."""
        return self.rectangle(global_shape, 0).shape


def ceil_shard(size: int, num_shards: int, index: int) -> tuple[int, int]:
    """Start and length of shard `index` of `size` rows in shards of ceil(size / num_shards)."""
    longest = -(-size // num_shards)
    start = min(index * longest, size)
    return start, min(longest, size - start)


class DTensorLayouts:
    """Finds the layout of a tensor and keeps one object for each kind of placement.

    Args:
        mesh: all ranks that hold the model, if tensors may be sharded over a sub-mesh only; they
            are replicated along the mesh's other dimensions.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self._known: dict[object, DTensorLayout] = {}
        self._mesh = mesh

    def of(self, tensor: DTensor) -> DTensorLayout:
        """The layout of a DTensor. Raises ConfigError if its placement is not supported."""
        key = (tensor.device_mesh, tensor.placements)
        if key not in self._known:
            self._known[key] = _layout(tensor, *self._on_whole_mesh(tensor))
        return self._known[key]

    def find(self, tensor: Tensor) -> DTensorLayout | None:
        """The layout of a DTensor; None for a tensor that every rank holds whole."""
        return self.of(tensor) if isinstance(tensor, DTensor) else None

    def _on_whole_mesh(self, tensor: DTensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """Mesh and placements, along the whole mesh if there is one."""
        own = tensor.device_mesh
        if self._mesh is None or own.ndim == self._mesh.ndim:
            return own, tensor.placements
        known = dict(zip(own.mesh_dim_names or (), tensor.placements, strict=False))
        names = self._mesh.mesh_dim_names or ()
        if len(known) < own.ndim or not known.keys() <= set(names):
            raise ConfigError(
                f"a parameter lies on the mesh {own}, which is no part of {self._mesh}; shard "
                "with a slice of it"
            )
        return self._mesh, tuple(known.get(name, Replicate()) for name in names)


def _layout(tensor: DTensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensorLayout:
    rank, ranks = dist.get_rank(), mesh.mesh
    if mesh.get_coordinate() is None:
        raise ConfigError(f"rank {rank} is no part of the device mesh {mesh}; use all ranks")
    order = _shard_order(placements, mesh)
    replicated = tuple(i for i, p in enumerate(placements) if type(p) is Replicate)
    if order is None or len(order) + len(replicated) != mesh.ndim or mesh.ndim - len(order) > 2:
        raise ConfigError(
            f"a parameter of shape {tuple(tensor.shape)} is placed as {placements}; required: "
            "sharded along one mesh dimension, or one more for tensor parallelism, and replicated "
            "along the others"
        )
    axes = tuple(sorted(order))
    # A row a replica, a column a shard, as in the table of the module's docstring.
    grid = ranks.permute(*replicated, *axes).reshape(-1, _size(mesh, axes))
    replica, index = (int(i) for i in (grid == rank).nonzero()[0])
    return DTensorLayout(
        sharded_dims=tuple(_sharded_dim(mesh, axes, axis, placements[axis]) for axis in order),
        shard_ranks=tuple(grid[replica].tolist()),
        shard_group=_group(mesh, axes),
        replica_ranks=tuple(grid[:, index].tolist()),
        replica_group=_group(mesh, replicated),
        replica_of={r: i for i, row in enumerate(grid.tolist()) for r in row},
        shard_of={r: j for row in grid.tolist() for j, r in enumerate(row)},
        rank=rank,
    )


def _shard_order(placements: tuple[Placement, ...], mesh: DeviceMesh) -> tuple[int, ...] | None:
    """Mesh dimensions in the order in which they split; None if that is not supported.

    `fully_shard` splits what tensor parallelism, on a later mesh dimension, has left. torch marks
    that by a _StridedShard whose split factor is the number of tensor-parallel ranks.
    """
    axes = [i for i, p in enumerate(placements) if type(p) in (Shard, _StridedShard)]
    strided = [i for i in axes if type(placements[i]) is _StridedShard]
    if len(axes) > 2 or strided not in ([], axes[:1]) or (strided and len(axes) != 2):
        return None
    dims = {getattr(placements[i], "dim", None) for i in axes}
    if len(axes) == 2 and len(dims) == 1 and not strided:
        return None
    if strided and getattr(placements[axes[0]], "split_factor", 0) != mesh.size(axes[1]):
        return None
    return tuple(reversed(axes))


def _sharded_dim(
    mesh: DeviceMesh, axes: tuple[int, ...], axis: int, placement: Placement
) -> ShardedDim:
    later = tuple(a for a in axes if a > axis)
    dim: int = placement.dim  # type: ignore[attr-defined]  # a Shard or a _StridedShard
    return ShardedDim(dim=dim, num_shards=mesh.size(axis), stride=_size(mesh, later))


def _size(mesh: DeviceMesh, axes: tuple[int, ...]) -> int:
    return prod(mesh.size(axis) for axis in axes)


def _group(mesh: DeviceMesh, axes: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The ranks along some mesh dimensions; None if this rank is alone there."""
    long = tuple(axis for axis in axes if mesh.size(axis) > 1)
    if len(long) < 2:
        return mesh.get_group(long[0]) if long else None
    if _size(mesh, long) == dist.get_world_size():
        return dist.group.WORLD
    names = mesh.mesh_dim_names or ()
    return mesh[tuple(names[axis] for axis in long)]._flatten().get_group()
