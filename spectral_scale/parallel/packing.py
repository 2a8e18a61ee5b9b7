"""Several tensors in one message: fewer collectives, the same bytes, the same numbers.

Tensors of shapes (2, 3) and (4,) in float32 and one of shape (5,) in bfloat16 make two messages:
10 float32 elements, the first tensor's 6 followed by the second's 4, and the bfloat16 tensor, which
is alone in its dtype and travels from where it is. A message has one dtype and one device because
that is what a collective takes, and packing must not round.

Invariant: every rank gives the same shapes and dtypes in the same order, so that all ranks cut a
message at the same places.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from spectral_scale.parallel.collective import Collective


def broadcast_into(
    targets: Mapping[str, Tensor],
    values: Mapping[str, Tensor | None],
    collective: Collective,
    *,
    owner: int,
) -> None:
    """Overwrite tensors that every rank holds whole with rank `owner`'s values, in place.

    One broadcast a dtype, of a packed copy; a tensor that is alone in its dtype is sent from where
    it is. Collective.

    Args:
        targets: what is overwritten, by name, in the same order on every rank; contiguous.
        values: by the same names, of any precision; None but on the owner.
    """
    for name, target in targets.items():
        value = values[name]
        if value is not None:
            target.copy_(value)
    if collective.world_size == 1:
        return
    for packet in by_dtype(targets.values()):
        if len(packet) == 1:
            collective.broadcast(packet[0], owner)
            continue
        mine = collective.rank == owner
        flat = torch.cat([t.view(-1) for t in packet]) if mine else _empty(packet)
        collective.broadcast(flat, owner)
        if not mine:
            unpack(flat, packet)


def by_dtype(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors that can share a message, in their order; empty ones are left out."""
    packets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            packets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    yield from packets.values()


def unpack(flat: Tensor, into: Iterable[Tensor]) -> None:
    """Copy the elements of `flat` into the tensors, one after another."""
    start = 0
    for tensor in into:
        tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()


def _empty(packet: list[Tensor]) -> Tensor:
    return packet[0].new_empty(sum(t.numel() for t in packet))
