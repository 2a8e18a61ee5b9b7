"""Pieces of DTensors: this rank's own, and whole tensors cut, scattered and gathered.

On the wire every piece has the full length (see `parallel.layouts`).
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectral_scale.parallel.dtensor_layout import Layout
from spectral_scale.parallel.shard_geometry import Rectangle, Shape


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing memory; a tensor that is not distributed is its own."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank may hold only a piece of it."""
    return isinstance(tensor, DTensor)


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
    if layout.replica_of[owner] != layout.replica_of[layout.rank]:
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
    if layout.replica_of[owner] == layout.replica_of[layout.rank]:
        packed = _pack(values, shapes, layout, mine) if layout.rank == owner else None
        if layout.shard_group is not None:
            dist.scatter(mine, packed, src=owner, group=layout.shard_group)
        elif packed is not None:
            mine = packed[0]
    if layout.replica_group is not None:
        source = next(
            r for r in layout.replica_ranks if layout.replica_of[r] == layout.replica_of[owner]
        )
        dist.broadcast(mine, source, group=layout.replica_group)
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
