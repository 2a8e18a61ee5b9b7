"""Where the pieces of a DTensor lie, and how whole tensors are cut, scattered and gathered.

Pieces are those of `fully_shard`: the tensor is cut along one dimension into ceil(n / parts) long
pieces; the last ones may be shorter or empty. On the wire every piece has the full length.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rectangles import Rectangle, Shape


@dataclass(frozen=True, eq=False)
class Layout:
    """How one kind of tensor is spread over ranks; the same object for tensors spread alike."""

    dim: int | None
    """Dimension that is cut; None: every rank holds the tensor whole."""
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
        if self.dim is None:
            return Rectangle((0,) * len(global_shape), global_shape)
        where = self.index if index is None else index
        start, length = piece(global_shape[self.dim], self.parts, where)
        offset = tuple(start if d == self.dim else 0 for d in range(len(global_shape)))
        shape = tuple(length if d == self.dim else n for d, n in enumerate(global_shape))
        return Rectangle(offset, shape)

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
    """Finds the layout of a tensor; one object for each kind of placement."""

    def __init__(self) -> None:
        self._known: dict[object, Layout] = {}

    def of(self, tensor: DTensor) -> Layout:
        """The layout of a DTensor. Raises ConfigError if it is cut in a way not supported."""
        key = (tensor.device_mesh, tensor.placements)
        if key not in self._known:
            self._known[key] = _layout(tensor)
        return self._known[key]


def _layout(tensor: DTensor) -> Layout:
    mesh, rank = tensor.device_mesh, dist.get_rank()
    coordinate = mesh.get_coordinate()
    shards = [i for i, p in enumerate(tensor.placements) if type(p) is Shard]
    copies = [i for i, p in enumerate(tensor.placements) if type(p) is Replicate]
    if len(shards) > 1 or len(copies) > 1 or len(shards) + len(copies) != mesh.ndim:
        raise ConfigError(
            f"a parameter of shape {tuple(tensor.shape)} is placed as {tensor.placements}; "
            "required: cut along one mesh dimension, and replicated along at most one other"
        )
    if coordinate is None:
        raise ConfigError(f"rank {rank} is no part of the device mesh {mesh}; use all ranks")
    shard_axis, copy_axis = next(iter(shards), None), next(iter(copies), None)
    placement = None if shard_axis is None else tensor.placements[shard_axis]
    ranks: Tensor = mesh.mesh
    by_copy = ranks[None] if copy_axis is None else ranks.movedim(copy_axis, 0)
    return Layout(
        dim=placement.dim if isinstance(placement, Shard) else None,
        shard_ranks=_line(ranks, coordinate, shard_axis),
        shard_group=_group(mesh, shard_axis),
        copy_ranks=_line(ranks, coordinate, copy_axis),
        copy_group=_group(mesh, copy_axis),
        copy_of={r: i for i, copy in enumerate(by_copy) for r in copy.flatten().tolist()},
        rank=rank,
    )


def _line(ranks: Tensor, coordinate: Sequence[int], axis: int | None) -> tuple[int, ...]:
    """Ranks of the mesh that differ from this one along `axis` only."""
    index = tuple(slice(None) if d == axis else c for d, c in enumerate(coordinate))
    return tuple(int(r) for r in ranks[index].flatten())


def _group(mesh: DeviceMesh, axis: int | None) -> dist.ProcessGroup | None:
    return None if axis is None or mesh.size(axis) == 1 else mesh.get_group(axis)


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
    trimmed = [p[_corner(layout.rectangle(shape, i).shape)] for i, p in enumerate(pieces)]
    return torch.cat(trimmed, dim=layout.dim or 0)


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
