"""Memory and time of a run. Its arithmetic is in `flops`, its spectra in `ops.decomposition`."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind `tensors`, each storage once; None counts nothing.

    A view counts its whole storage, and several views of one storage count it once, so that
    flat buffers are neither missed nor doubled. Distributed tensors count their local part.
    """
    sizes: dict[tuple[str, int], int] = {}
    held = [_local(tensor) for tensor in tensors if tensor is not None]
    for tensor in held:  # a list, so that no storage is freed, and its address reused, meanwhile
        storage = tensor.untyped_storage()
        address = 0 if tensor.is_meta else storage.data_ptr()
        # Meta and empty storages have no address; their own identity takes its place.
        key = (str(tensor.device), address) if address else ("unbacked", storage._cdata)
        sizes[key] = max(sizes.get(key, 0), storage.nbytes())
    return sum(sizes.values())


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: tensors of a CUDA `device`, else the process's resident set.

    The CUDA figure is since start or `torch.cuda.reset_peak_memory_stats`; the process's cannot
    be reset.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # absent on Windows, where only CUDA is measured

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StepTimer:
    """Wall seconds of named phases, summed until taken.

    Args:
        synchronize: called at both ends of every phase (`torch.cuda.synchronize`), so that work
            queued on a device is charged to the phase that queued it; None: host time only.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body and add it to `name`, also when the body raises. Phases may nest."""
        begin = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - begin

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, in the order the phases first ended."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
