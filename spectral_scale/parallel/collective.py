"""The few collectives the product needs outside a host framework, and their one-process twin.

Objects travel as JSON bytes in tensors, never as pickles. Every method is collective: all ranks of
the group call it, in the same order.
"""

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """What ranks can do together."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def gather_json(self, value: Any) -> list[Any] | None:
        """Values of all ranks by rank on rank 0; None elsewhere."""

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """The value of rank `source` on every rank."""

    def agree(self, error: str | None, *, what: str) -> str | None:
        """The first failing rank's "rank k: error" on every rank, or None if no rank has one."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` in place with rank `source`'s."""

    def all_to_all(
        self, received: Tensor, sent: Tensor, sizes_in: list[int], sizes_out: list[int]
    ) -> None:
        """Send `sizes_out[k]` elements to rank k, and fill `received` with `sizes_in[k]` of its."""


class SingleProcess:
    """A group of one."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        """Return at once."""

    def gather_json(self, value: Any) -> list[Any] | None:
        """Hold the one value."""
        return [value]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """Hand the value back."""
        return value

    def agree(self, error: str | None, *, what: str) -> str | None:
        """Report this process's own error."""
        return None if error is None else f"rank 0: {what}: {error}"

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Leave the tensor as it is."""
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Leave the tensor as it is."""
        return tensor

    def all_to_all(
        self, received: Tensor, sent: Tensor, sizes_in: list[int], sizes_out: list[int]
    ) -> None:
        """Copy what is sent to the one rank."""
        received.copy_(sent)


class ProcessGroup:
    """A torch.distributed group, by default of all ranks; JSON and flags live on `device`.

    `rank` and `source` count within the group.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.device = device
        self._group = group

    def barrier(self) -> None:
        """Return when every rank has called it."""
        dist.barrier(group=self._group)

    def _encode(self, value: Any) -> Tensor:
        data = json.dumps(value).encode()
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)

    def gather_json(self, value: Any) -> list[Any] | None:
        """Values of all ranks by rank on rank 0; None elsewhere."""
        data = self._encode(value)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = data.numel()
        dist.all_reduce(sizes, group=self._group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._group)
        if self.rank != 0:
            return None
        return [
            json.loads(bytes(part[: int(size)].cpu().numpy()))
            for part, size in zip(parts, sizes, strict=True)
        ]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """The value of rank `source` on every rank."""
        mine = self.rank == source
        data = self._encode(value) if mine else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=self.device)
        dist.broadcast(size, group=self._group, group_src=source)
        if not mine:
            data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, group=self._group, group_src=source)
        return json.loads(bytes(data.cpu().numpy()))

    def agree(self, error: str | None, *, what: str) -> str | None:
        """The first failing rank's error on every rank, or None; if all is well, one all-reduce."""
        first = torch.tensor([self.world_size if error is None else self.rank], device=self.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self._group)
        failed = int(first)
        if failed == self.world_size:
            return None
        text = self.broadcast_json(error, source=failed)
        return f"rank {failed}: {what}: {text}"

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` in place with rank `source`'s."""
        dist.broadcast(tensor, group=self._group, group_src=source)
        return tensor

    def all_to_all(
        self, received: Tensor, sent: Tensor, sizes_in: list[int], sizes_out: list[int]
    ) -> None:
        """Send `sizes_out[k]` elements to rank k, and fill `received` with `sizes_in[k]` of its."""
        dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=self._group)
