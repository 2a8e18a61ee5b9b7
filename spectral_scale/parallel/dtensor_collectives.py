"""Whole tensors gathered from the shards of DTensors, and scattered to them.

gloo and NCCL gather and scatter messages of one size, so that every shard travels padded with
zeros to the longest one. A vector of 5 entries a b c d e over 3 ranks:

    shards:        [a b]  [c d]  [e]
    on the wire:   [a b]  [c d]  [e 0]
    the owner drops the padding and puts each shard at its place (`DTensorLayout.rectangle`).

The replica of the owner alone gathers. When values are scattered, the owner's replica takes part
in the scatter, and each of its ranks broadcasts what it got to the ranks that hold the same shard
in the other replicas: every byte crosses between replicas once.

Invariant: every rank of a group calls the same collectives in the same order, because what it
calls depends on layouts and the owner alone, which all ranks know.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectral_scale.parallel.dtensor_layout import DTensorLayout
from spectral_scale.parallel.shard_geometry import Rectangle, Shape


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; a tensor that is not distributed is returned whole."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank may hold only a shard of the tensor."""
    return isinstance(tensor, DTensor)


def sum_over_shards(
    values: Sequence[Tensor], layouts: Iterable[DTensorLayout | None]
) -> list[Tensor]:
    """Each value summed over the shards of its layout; one all-reduce a group. Collective.

    A value whose layout has one shard, or is None, is complete already and is not touched.
    """
    results = list(values)
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for i, layout in enumerate(layouts):
        if layout is not None and layout.shard_group is not None:
            by_group.setdefault(layout.shard_group, []).append(i)
    for group, members in by_group.items():
        flat = torch.cat([results[i].flatten() for i in members])
        dist.all_reduce(flat, group=group)
        sums = flat.split([results[i].numel() for i in members])
        for i, total in zip(members, sums, strict=True):
            results[i] = total.view(results[i].shape)
    return results


def gather(tensor: DTensor, layout: DTensorLayout, *, owner: int) -> Tensor | None:
    """The whole tensor on rank `owner`, None elsewhere. Only the owner's replica takes part.

    Collective over that replica; other ranks return at once.
    """
    if layout.replica_of[owner] != layout.replica_of[layout.rank]:
        return None
    if layout.shard_group is None:
        return local(tensor).clone() if layout.rank == owner else None
    shape = tuple(tensor.shape)
    mine = _pad(local(tensor), layout.padded_shape(shape))
    shards = [torch.empty_like(mine) for _ in layout.shard_ranks] if layout.rank == owner else None
    dist.gather(mine, shards, dst=owner, group=layout.shard_group)
    if shards is None:
        return None
    whole = mine.new_empty(shape)
    for i, shard in enumerate(shards):
        box = layout.rectangle(shape, i)
        whole[box.slices_in(Rectangle((0,) * len(shape), shape))] = shard[_corner(box.shape)]
    return whole


def scatter(
    values: Sequence[Tensor | None], into: Sequence[DTensor], layout: DTensorLayout, *, owner: int
) -> None:
    """Overwrite tensors sharded alike, of one dtype, with rank `owner`'s whole ones, in place.

    One scatter inside the owner's replica, then one broadcast from its ranks to other replicas.
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
    for tensor, shard, shape in zip(into, mine.split(sizes), padded, strict=True):
        target = local(tensor)
        target.copy_(shard.view(shape)[_corner(tuple(target.shape))])


def _pack(
    values: Sequence[Tensor | None], shapes: Sequence[Shape], layout: DTensorLayout, like: Tensor
) -> list[Tensor]:
    """A 1-D tensor per shard index: that shard of every value, padded, in the dtype of `like`."""
    packed = []
    for index in range(layout.num_shards):
        shards = []
        for value, shape in zip(values, shapes, strict=True):
            if value is None or tuple(value.shape) != shape:
                given = None if value is None else tuple(value.shape)
                raise ValueError(f"the owner gave {given} for a parameter of shape {shape}")
            box = layout.rectangle(shape, index)
            shard = value.detach()[box.slices_in(Rectangle((0,) * len(shape), shape))]
            shards.append(_pad(shard.to(like.device, like.dtype), layout.padded_shape(shape)))
        packed.append(torch.cat([shard.flatten() for shard in shards]))
    return packed


def _pad(shard: Tensor, shape: Shape) -> Tensor:
    """`shard` in the corner of a contiguous tensor of `shape`, zeros around it."""
    if tuple(shard.shape) == shape:
        return shard.contiguous()
    result = shard.new_zeros(shape)
    result[_corner(tuple(shard.shape))] = shard
    return result


def _corner(shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(n) for n in shape)
