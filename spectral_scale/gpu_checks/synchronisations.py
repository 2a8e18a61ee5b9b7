"""Counts how often the host waits for the device, and at which lines."""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_scale.gpu_checks.place import Place

MESSAGE = "called a synchronizing CUDA operation"
READ = torch.ops.aten._local_scalar_dense.default
"""What `.item()`, `float()` and `bool()` of a tensor come to."""
NOT_CALLERS = (str(Path(torch.__file__).parent), __file__, warnings.__file__)


class SyncCounter:
    """Waits by the line that caused them; `count` is their sum."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Waits since the beginning."""
        return sum(self.places.values())

    def note(self) -> None:
        """Count a wait that happens now."""
        self.places[caller()] += 1


def caller() -> str:
    """The innermost line outside torch and this file, as file:line."""
    for frame, line in traceback.walk_stack(sys._getframe()):
        if not frame.f_code.co_filename.startswith(NOT_CALLERS):
            return f"{frame.f_code.co_filename}:{line}"
    return "torch"


@contextmanager
def counting_syncs(place: Place) -> Iterator[SyncCounter]:
    """Inside, every wait for the device that torch notices is counted.

    On a GPU torch itself tells of copies to pageable memory, `.item()`, `nonzero` and the like,
    though not of those inside torch.distributed. In a rehearsal, reads of single numbers stand for
    them.
    """
    counter = SyncCounter()
    if place.device.type != "cuda":
        with _ReadCounter(counter):
            yield counter
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if MESSAGE in str(message):
                counter.note()
            else:
                shown(message, category, filename, lineno, *rest)

        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counter
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _ReadCounter(TorchDispatchMode):
    """Counts reads of single numbers from tensors."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then call."""
        if func is READ:
            self._counter.note()
        return func(*args, **(kwargs or {}))
