"""How long work takes where it is done: on the host's clock, or on the GPU's.

The host queues work for a GPU and goes on, so that its clock says when work was queued. An event in
the queue says when the device came to it; the time between two of them is read later.
"""

import time
from typing import Any

import torch


class Span:
    """The time from its creation to `end`, on a device.

    Args:
        device: of a GPU, whose current stream is watched; else the host's clock counts.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._began = self._now()
        self._ended: Any = None

    def end(self) -> None:
        """The work is done, or queued."""
        self._ended = self._now()

    def seconds(self) -> float:
        """From the creation to `end`; waits until the device has come there. 0 without an end."""
        if self._ended is None:
            return 0.0
        if not self._on_gpu:
            return float(self._ended - self._began)
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000

    def _now(self) -> Any:
        """The host's seconds, or an event in the device's queue."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
