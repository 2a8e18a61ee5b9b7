"""How much memory tensors take at most while something runs, counted on any device."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_scale.parallel.dtensor_collectives import local


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that were created in its scope and are still alive, and their peak.

    Temporary memory inside an operator is not seen, and sparse tensors are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, then count new storages among the results."""
        given = {t.untyped_storage().data_ptr() for t in _tensors([args, kwargs or {}])}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in given and address not in self._known:
                self._known.add(address)
                self.current_bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return result

    def _freed(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self.current_bytes -= nbytes


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, what autograd saves is kept; the result counts its bytes at any time, each storage
    once, parameters (gathered ones, too) left out."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            kept.append(_plain(tensor))  # so that no address is used again
        return tensor

    def count() -> int:
        parameters = _storages([local(p) for p in model.parameters()])
        return sum(n for address, n in _storages(kept).items() if address not in parameters)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield count


def _plain(tensor: Tensor) -> Tensor:
    """What a DTensor, or the result of one of its collectives, holds on this rank."""
    tensor = local(tensor)
    return tensor.trigger_wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Address -> bytes of what has not been freed."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        value = _plain(value)
        return [value] if value.layout is torch.strided else []
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []
