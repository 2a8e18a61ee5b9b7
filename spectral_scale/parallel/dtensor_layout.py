"""Where the pieces of a DTensor lie: which part of a tensor each rank holds.

`fully_shard` shards a tensor along one dimension into shards of ceil(n / parts) entries; the last
ones may be shorter or empty. Under tensor parallelism each rank's equal part is
cut that way.
"""

from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import Rectangle, Shape


@dataclass(frozen=True)
class ShardedDim:
    """One cut of a tensor into pieces."""

    dim: int
    """Dimension of the tensor."""
    parts: int
    """Pieces along it."""
    stride: int
    """Pieces of the whole tensor from one to the next: piece i is part (i // stride) % parts."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How one kind of tensor is spread over ranks; the same object for tensors spread alike."""

    cuts: tuple[ShardedDim, ...]
    """In the order they are made, each within the part that the one before left; none: every rank
    holds the tensor whole."""
    shard_ranks: tuple[int, ...]
    """Global ranks that hold the pieces of one copy, in the order of the pieces."""
    shard_group: dist.ProcessGroup | None
    """Those ranks; None if there is one piece."""
    replica_ranks: tuple[int, ...]
    """Global ranks that hold the same piece as this one."""
    replica_group: dist.ProcessGroup | None
    """Those ranks; None if there is one copy."""
    replica_of: dict[int, int]
    """Global rank -> the copy that it belongs to."""
    piece_of: dict[int, int]
    """Global rank -> the piece that it holds."""
    rank: int
    """This process."""

    @property
    def dim(self) -> int | None:
        """The dimension that is cut; None if none is. Raises ConfigError if there are two."""
        dims = {cut.dim for cut in self.cuts}
        if len(dims) > 1:
            raise ConfigError(f"a tensor is cut along dimensions {sorted(dims)}; one is required")
        return next(iter(dims), None)

    @property
    def parts(self) -> int:
        """Pieces of one copy."""
        return len(self.shard_ranks)

    @property
    def index(self) -> int:
        """The piece held here."""
        return self.shard_ranks.index(self.rank)

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank's copy is the one that is written to checkpoints."""
        return self.replica_of[self.rank] == 0

    def rectangle(self, global_shape: Shape, index: int | None = None) -> Rectangle:
        """The part of a whole tensor that a piece (by default this rank's) is."""
        where = self.index if index is None else index
        offset, shape = [0] * len(global_shape), list(global_shape)
        for cut in self.cuts:
            start, length = piece(shape[cut.dim], cut.parts, where // cut.stride % cut.parts)
            offset[cut.dim] += start
            shape[cut.dim] = length
        return Rectangle(tuple(offset), tuple(shape))

    def padded_shape(self, global_shape: Shape) -> Shape:
        """Shape of the longest piece."""
        return self.rectangle(global_shape, 0).shape


def piece(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of piece `index` of `size` rows cut into ceil(size / parts) long ones."""
    longest = -(-size // parts)
    start = min(index * longest, size)
    return start, min(longest, size - start)


class Layouts:
    """Finds the layout of a tensor; one object for each kind of placement.

    Args:
        mesh: all ranks that hold the model, if tensors may be spread over a part of it only; they
            are the same along the mesh's other dimensions.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self._known: dict[object, Layout] = {}
        self._mesh = mesh

    def of(self, tensor: DTensor) -> Layout:
        """The layout of a DTensor. Raises ConfigError if it is cut in a way not supported."""
        key = (tensor.device_mesh, tensor.placements)
        if key not in self._known:
            self._known[key] = _layout(tensor, *self._spread(tensor))
        return self._known[key]

    def _spread(self, tensor: DTensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """Mesh and placements, along the whole mesh if there is one."""
        part = tensor.device_mesh
        if self._mesh is None or part.ndim == self._mesh.ndim:
            return part, tensor.placements
        known = dict(zip(part.mesh_dim_names or (), tensor.placements, strict=False))
        names = self._mesh.mesh_dim_names or ()
        if len(known) < part.ndim or not known.keys() <= set(names):
            raise ConfigError(
                f"a parameter lies on the mesh {part}, which is no part of {self._mesh}; shard "
                "with a slice of it"
            )
        return self._mesh, tuple(known.get(name, Replicate()) for name in names)


def _layout(tensor: DTensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Layout:
    rank, ranks = dist.get_rank(), mesh.mesh
    if mesh.get_coordinate() is None:
        raise ConfigError(f"rank {rank} is no part of the device mesh {mesh}; use all ranks")
    order = _cut_order(placements, mesh)
    copies = tuple(i for i, p in enumerate(placements) if type(p) is Replicate)
    if order is None or len(order) + len(copies) != mesh.ndim or mesh.ndim - len(order) > 2:
        raise ConfigError(
            f"a parameter of shape {tuple(tensor.shape)} is placed as {placements}; required: cut "
            "along one mesh dimension, or one more for tensor parallelism, and replicated along "
            "the others"
        )
    axes = tuple(sorted(order))
    grid = ranks.permute(*copies, *axes).reshape(-1, _size(mesh, axes))
    copy, index = (int(i) for i in (grid == rank).nonzero()[0])
    return Layout(
        cuts=tuple(_cut(mesh, axes, axis, placements[axis]) for axis in order),
        shard_ranks=tuple(grid[copy].tolist()),
        shard_group=_group(mesh, axes),
        replica_ranks=tuple(grid[:, index].tolist()),
        replica_group=_group(mesh, copies),
        replica_of={r: i for i, row in enumerate(grid.tolist()) for r in row},
        piece_of={r: j for row in grid.tolist() for j, r in enumerate(row)},
        rank=rank,
    )


def _cut_order(placements: tuple[Placement, ...], mesh: DeviceMesh) -> tuple[int, ...] | None:
    """Mesh dimensions in the order in which they cut; None if that is not supported.

    `fully_shard` cuts what tensor parallelism, on a later mesh dimension, has left.
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


def _cut(mesh: DeviceMesh, axes: tuple[int, ...], axis: int, placement: Placement) -> ShardedDim:
    later = tuple(a for a in axes if a > axis)
    dim: int = placement.dim  # type: ignore[attr-defined]  # a Shard or a _StridedShard
    return ShardedDim(dim=dim, parts=mesh.size(axis), stride=_size(mesh, later))


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
