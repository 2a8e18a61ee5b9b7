"""Counts what a GPU would be asked to do: launches, bytes, waits of the host, collectives."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_FREE = ("empty", "detach", "alias", "lift_fresh", "_unsafe_view", "record_stream", "new_empty")
"""Operators that launch nothing, views apart."""
_UNREAD = ("copy_", "zero_", "fill_", "normal_", "uniform_")
"""Operators that write their first argument without reading it."""


class Launches(TorchDispatchMode):
    """Counts operators in its scope on tensors of one device, forward and backward.

    An operator counts as one launch, also where cuBLAS or a foreach operator needs a few. Its bytes
    are those of the tensors that it reads and writes, as if none stayed in a cache. On fake tensors
    a value that the host asks for is answered with zero.

    Args:
        device_type: the device that is watched.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type = device_type
        self.launches = 0
        self.nbytes = 0
        self.waits = 0
        """How often the host waited for the device: scalars, and copies to the host."""
        self.collectives: Counter[str] = Counter()
        self.by_operator: Counter[str] = Counter()
        self.largest: dict[str, int] = {}
        """Largest result of each operator, in bytes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then call."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that what it does with its pieces is seen
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            return self._answer(name, func, args, kwargs)
        result = func(*args, **kwargs)
        self._count(name, func, args, kwargs, result)
        return result

    def figures(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "launches": self.launches,
            "megabytes": round(self.nbytes / 1e6, 1),
            "waits": self.waits,
            "collectives": dict(self.collectives),
            "by_operator": dict(self.by_operator.most_common()),
        }

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.namespace in ("c10d", "_c10d_functional"):
            if not name.startswith("wait_tensor"):
                self.collectives[name.strip("_")] += 1
            return
        read = tensors([args[1:] if name in _UNREAD else args])
        read += tensors([v for k, v in kwargs.items() if k != "out"])
        written = tensors(result) or _mutated(func, args)
        if not any(t.device.type == self.device_type for t in (*read, *written)):
            return
        if func.is_view or name.startswith(_FREE) or func.namespace == "prim" or not written:
            return
        if name in ("_to_copy", "copy_") and written[0].device.type != self.device_type:
            positional = args[2] if name == "copy_" and len(args) > 2 else False
            self.waits += not kwargs.get("non_blocking", positional)
        self.launches += 1
        self.nbytes += sum(t.nbytes for t in (*read, *written))
        self.by_operator[name] += 1
        self.largest[name] = max(self.largest.get(name, 0), *(t.nbytes for t in written))

    def _answer(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """What the host wants to know of values."""
        tensor = args[0]
        if tensor.device.type == self.device_type:
            self.waits += 1
            self.by_operator[name] += 1
        if not isinstance(tensor, torch._subclasses.FakeTensor):
            return func(*args, **kwargs)
        if name == "nonzero":
            return tensor.new_empty((0, tensor.ndim), dtype=torch.int64)
        return False if name != "_local_scalar_dense" or tensor.dtype == torch.bool else 0


def _mutated(func: Any, args: Any) -> list[Tensor]:
    """Arguments that an operator without results writes to, as foreach and fused ones do."""
    schema = zip(func._schema.arguments, args, strict=False)
    return tensors([v for a, v in schema if a.alias_info is not None and a.alias_info.is_write])


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a value, however nested in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return []
