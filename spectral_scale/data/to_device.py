"""A step's batches on their way to the device, beside the work that it is still doing."""

from collections.abc import Sequence

import torch

from spectral_scale.data.loader import Batch


class BatchMover:
    """Moves batches to the device.

    On a GPU they are copied from pinned memory by a stream of their own. The host runs ahead of the
    device, so that the copies of a step are made while the device computes the step before; the
    queue of the computation waits for them, and the host does not.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def move(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches on the device; on the CPU they are the same tensors."""
        if self._stream is None:
            return [Batch(*(t.to(self._device) for t in batch)) for batch in batches]
        with torch.cuda.stream(self._stream):
            moved = [
                Batch(*(t.pin_memory().to(self._device, non_blocking=True) for t in batch))
                for batch in batches
            ]
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for batch in moved:
            for tensor in batch:
                tensor.record_stream(computing)  # its memory is not reused before it is read
        return moved
