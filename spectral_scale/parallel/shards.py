"""Where the pieces of a DTensor lie, and how whole tensors are cut, scattered and gathered.

Pieces are those of `fully_shard`: the tensor is cut along one dimension into ceil(n / parts) long
pieces; the last ones may be shorter or empty. Under tensor parallelism each rank's equal part is
cut that way. On the wire every piece has the full length.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rectangles import Rectangle, Shape


@dataclass(frozen=True)
class Cut:
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

    cuts: tuple[Cut, ...]
    """In the order they are made, each within the part that the one before left; none: every rank
    holds the tensor whole."""
    shard_ranks: tuple[int, ...]
    """Global ranks that hold the pieces of one copy, in the order of the pieces."""
    shard_group: dist.ProcessGroup | None
    """Those ranks; None if there is one piece."""
    copy_ranks: tuple[int, ...]
    """Global ranks that hold the same piece as this one."""
    copy_group: dist.ProcessGroup | None
    """Those ranks; None if there is one copy."""
    copy_of: dict[int, int]
    """Global rank -> the copy that it belongs to."""
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
    def is_first_copy(self) -> bool:
        """Whether this rank's copy is the one that is written to checkpoints."""
        return self.copy_of[self.rank] == 0

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


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing memory; a tensor that is not distributed is its own."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank may hold only a piece of it."""
    return isinstance(tensor, DTensor)


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
    order = _cut_order(placements)
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
        copy_ranks=tuple(grid[:, index].tolist()),
        copy_group=_group(mesh, copies),
        copy_of={r: i for i, row in enumerate(grid.tolist()) for r in row},
        rank=rank,
    )


def _cut_order(placements: tuple[Placement, ...]) -> tuple[int, ...] | None:
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
    return tuple(reversed(axes))


def _cut(mesh: DeviceMesh, axes: tuple[int, ...], axis: int, placement: Placement) -> Cut:
    later = tuple(a for a in axes if a > axis)
    dim: int = placement.dim  # type: ignore[attr-defined]  # a Shard or a _StridedShard
    return Cut(dim=dim, parts=mesh.size(axis), stride=_size(mesh, later))


def _size(mesh: DeviceMesh, axes: tuple[int, ...]) -> int:
    result = 1
    for axis in axes:
        result *= mesh.size(axis)
    return result


def _group(mesh: DeviceMesh, axes: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The ranks along some mesh dimensions; None if this rank is alone there."""
    long = tuple(axis for axis in axes if mesh.size(axis) > 1)
    if len(long) < 2:
        return mesh.get_group(long[0]) if long else None
    if _size(mesh, long) == dist.get_world_size():
        return dist.group.WORLD
    names = mesh.mesh_dim_names or ()
    return mesh[tuple(names[axis] for axis in long)]._flatten().get_group()


def sum_over_shards(values: Sequence[Tensor], layouts: Iterable[Layout | None]) -> list[Tensor]:
    """Each value summed over the pieces of its layout; one all-reduce a group. Collective.

    A value of a layout that is not cut, or that is None, is complete already and is not touched.
    """
    results = list(values)
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for i, layout in enumerate(layouts):
        if layout is not None and layout.shard_group is not None:
            by_group.setdefault(layout.shard_group, []).append(i)
    for group, members in by_group.items():
        flat = torch.cat([results[i].flatten() for i in members])
        dist.all_reduce(flat, group=group)
        parts = flat.split([results[i].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            results[i] = part.view(results[i].shape)
    return results


def gather(tensor: DTensor, layout: Layout, *, owner: int) -> Tensor | None:
    """The whole tensor on rank `owner`, None elsewhere. Only the owner's copy takes part.

    Collective over that copy; other ranks return at once.
    """
    if layout.copy_of[owner] != layout.copy_of[layout.rank]:
        return None
    if layout.shard_group is None:
        return local(tensor).clone() if layout.rank == owner else None
    shape = tuple(tensor.shape)
    mine = _pad(local(tensor), layout.padded_shape(shape))
    pieces = [torch.empty_like(mine) for _ in layout.shard_ranks] if layout.rank == owner else None
    dist.gather(mine, pieces, dst=owner, group=layout.shard_group)
    if pieces is None:
        return None
    whole = mine.new_empty(shape)
    for i, part in enumerate(pieces):
        box = layout.rectangle(shape, i)
        whole[box.slices_in(Rectangle((0,) * len(shape), shape))] = part[_corner(box.shape)]
    return whole


def scatter(
    values: Sequence[Tensor | None], into: Sequence[DTensor], layout: Layout, *, owner: int
) -> None:
    """Overwrite tensors spread alike, of one dtype, with rank `owner`'s whole ones, in place.

    One scatter inside the owner's copy, then one broadcast from its ranks to the other copies.
    Collective over the mesh. On the owner `values` holds the tensors, elsewhere None.
    """
    shapes = [tuple(t.shape) for t in into]
    padded = [layout.padded_shape(shape) for shape in shapes]
    sizes = [torch.Size(shape).numel() for shape in padded]
    if not sum(sizes):
        return
    mine = local(into[0]).new_empty(sum(sizes))
    if layout.copy_of[owner] == layout.copy_of[layout.rank]:
        packed = _pack(values, shapes, layout, mine) if layout.rank == owner else None
        if layout.shard_group is not None:
            dist.scatter(mine, packed, src=owner, group=layout.shard_group)
        elif packed is not None:
            mine = packed[0]
    if layout.copy_group is not None:
        source = next(r for r in layout.copy_ranks if layout.copy_of[r] == layout.copy_of[owner])
        dist.broadcast(mine, source, group=layout.copy_group)
    for tensor, part, shape in zip(into, mine.split(sizes), padded, strict=True):
        target = local(tensor)
        target.copy_(part.view(shape)[_corner(tuple(target.shape))])


def _pack(
    values: Sequence[Tensor | None], shapes: Sequence[Shape], layout: Layout, like: Tensor
) -> list[Tensor]:
    """For each piece, that piece of every value, padded and flattened, in `like`'s dtype."""
    packed = []
    for index in range(layout.parts):
        parts = []
        for value, shape in zip(values, shapes, strict=True):
            if value is None or tuple(value.shape) != shape:
                given = None if value is None else tuple(value.shape)
                raise ValueError(f"the owner gave {given} for a parameter of shape {shape}")
            box = layout.rectangle(shape, index)
            part = value.detach()[box.slices_in(Rectangle((0,) * len(shape), shape))]
            parts.append(_pad(part.to(like.device, like.dtype), layout.padded_shape(shape)))
        packed.append(torch.cat([p.flatten() for p in parts]))
    return packed


def _pad(part: Tensor, shape: Shape) -> Tensor:
    """`part` in the corner of a contiguous tensor of `shape`, zeros around it."""
    if tuple(part.shape) == shape:
        return part.contiguous()
    result = part.new_zeros(shape)
    result[_corner(tuple(part.shape))] = part
    return result


def _corner(shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(n) for n in shape)
