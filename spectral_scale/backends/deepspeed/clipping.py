"""Norms of gradients whose shards lie on several ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectral_scale.backends.deepspeed.store import ZeroStore
from spectral_scale.optim.groups import group_kind
from spectral_scale.parallel.packing import by_dtype


def gradients_by_kind(store: ZeroStore) -> dict[str, list[Tensor]]:
    """This rank's shards of the reduced gradients, after the last backward pass of a step."""
    found: dict[str, list[Tensor]] = {}
    for flat in store.layout.flats():
        parts = found.setdefault(group_kind(flat.group.get("name", "dense")), [])
        for parameter in flat.members:
            fragment = store.fragments[store.names[id(parameter)]]
            part = None if fragment is None else store.layout.gradient(fragment, parameter)
            if part is not None:
                parts.append(part)
    return found


def norms_by_kind(
    store: ZeroStore, gradients: Mapping[str, Sequence[Tensor]], *, loss_scale: float
) -> dict[str, Tensor]:
    """Norms over all ranks' shards, by kind. One all-reduce of a number a kind.

    Args:
        store: of the engine.
        gradients: of `gradients_by_kind`.
        loss_scale: what the gradients were multiplied by (fp16).
    """
    device = next(iter(store.parameters.values())).device
    squares = torch.stack([_square_sum(parts, device) for parts in gradients.values()])
    if not store.layout.replicated:
        squares = store.collective.all_reduce_sum(squares)
    return dict(zip(gradients, squares.sqrt() / loss_scale, strict=True))


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients by a 0-dim factor, in place; it is sent once to each device."""
    for packet in by_dtype(gradients):
        torch._foreach_mul_(packet, factor.to(packet[0].device, packet[0].dtype))


def _square_sum(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of all elements, in float32, on `device`."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    for packet in by_dtype(part.detach() for part in parts):
        norms = torch._foreach_norm(packet, 2, dtype=torch.float32)
        total += torch.stack(norms).square().sum().to(device)
    return total
