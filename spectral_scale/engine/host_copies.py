"""What a save in the background writes: the state of one step, in host memory of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_scale.parallel.chunks import TensorChunk


class HostCopies:
    """Copies chunks to host memory.

    A GPU copies in a stream of its own into pinned memory, which is kept from one save to the next.
    `take` only queues the copies: forward and backward passes go on beside them. Nothing may change
    the tensors before the copies are made, so the computation calls `before_change` first: the
    device then waits for what is left of them, and the host does not.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}
        self._stream: Any = None
        self._made: Any = None

    def take(self, chunks: Sequence[TensorChunk]) -> list[TensorChunk]:
        """The chunks in host memory; those of a GPU are there after `wait`."""
        self._made = None
        on_gpu = next((c.tensor.device for c in chunks if c.tensor.device.type == "cuda"), None)
        if on_gpu is not None:
            self._stream = self._stream or torch.cuda.Stream(on_gpu)
            self._stream.wait_stream(torch.cuda.current_stream(on_gpu))
        copies = [
            TensorChunk(c.name, self._copy(c), tuple(c.global_shape), tuple(c.offset))
            for c in chunks
        ]
        if on_gpu is not None:
            self._made = torch.cuda.Event()
            self._made.record(self._stream)
        return copies

    def wait(self) -> None:
        """Return when the copies are made; any thread may call it."""
        if self._made is not None:
            self._made.synchronize()

    def before_change(self) -> None:
        """What the device is given from now on waits for the copies."""
        if self._made is not None:
            torch.cuda.current_stream().wait_event(self._made)

    def _copy(self, chunk: TensorChunk) -> Tensor:
        tensor = chunk.tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        host = self._pinned.get(chunk.key)
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._pinned[chunk.key] = host
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host
