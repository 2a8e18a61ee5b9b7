"""What a step does, counted as it is called: bytes of collectives, shapes of products."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class TrafficCounter(TorchDispatchMode):
    """Counts the payload of every collective of torch.distributed in its scope, by operation.

    The payload is the whole message: of an all-gather its output, of a reduce-scatter its input, of
    a scatter or gather all pieces, of a send or an all-to-all what this rank sends. A ring moves
    (N - 1) / N of it over each rank's link, an all-reduce twice that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then call."""
        name = str(func)
        if name.startswith("c10d."):
            operation = name.split(".")[1].strip("_")
            self.calls[operation] += 1
            self.payload_bytes[operation] += _payload(operation, args)
        return func(*args, **(kwargs or {}))


class ProductShapes(TorchDispatchMode):
    """Collects the shapes of all matrix products in its scope, backward passes on the CPU too."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, then note the result's shape."""
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func) and isinstance(result, Tensor):
            self.shapes.add(tuple(result.shape))
        return result


def _payload(operation: str, args: Any) -> int:
    if operation in ("scatter", "gather"):  # both ends pass their own piece; only one has all
        own = args[0] if operation == "scatter" else args[1]
        group = next(a for a in args if isinstance(a, torch.ScriptObject))
        size = torch.distributed.ProcessGroup.unbox(group).size()
        return sum(t.nbytes for t in _tensors(own)) * size
    if operation == "alltoall_base":
        return int(args[1].nbytes)
    return max((t.nbytes for t in _tensors(args)), default=0)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []
