"""Numbers of the device that the host reads later, so that neither waits for the other.

On a GPU the host runs ahead: it queues the work of a step long before the device does it. Asking
for a number at once (`float(tensor)`) would empty that queue. Here the copy to host memory is
queued as well, and by the time the host asks, usually a step later, the number is long there.
"""

import torch
from torch import Tensor


class LateRead:
    """A copy of a tensor on its way to the host.

    Args:
        numbers: on any device, float64 or what converts exactly; may be overwritten afterwards on a
            GPU, but not on the CPU.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._arrived = numbers.detach(), None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; waits until the device has come as far as where this was made."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers
