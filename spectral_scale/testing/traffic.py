"""What a step does, counted as it is called: bytes of collectives, shapes of products."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class TrafficCounter(TorchDispatchMode):
    """Counts the payload of every collective of torch.distributed in its scope, by operation.

    The payload is the whole message: of an all-gather its output, of a reduce-scatter its input, of
    a scatter or gather all shards, of a send or an all-to-all what this rank sends. A ring moves
    (N - 1) / N of it over each rank's link, an all-reduce twice that. DTensor's collectives count,
    too, under names of their own (`all_reduce` beside `allreduce`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.by_group: Counter[tuple[tuple[int, ...], str]] = Counter()
        """Bytes by the group's global ranks and the operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then call."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that what it does with its shards is seen
        name = str(func)
        space, _, rest = name.partition(".")
        if space in ("c10d", "_c10d_functional") and not rest.startswith("wait_tensor"):
            operation = rest.split(".")[0].strip("_")
            group = _group(args)
            size = _payload(operation, args, group)
            self.calls[operation] += 1
            self.payload_bytes[operation] += size
            if group is not None:
                ranks = tuple(dist.get_process_group_ranks(group))
                self.by_group[ranks, operation] += size
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


def _group(args: Any) -> dist.ProcessGroup | None:
    """The one among the arguments, which DTensor's collectives give by name, at the end."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    name = args[-1] if args else None
    resolve: Any = getattr(distributed_c10d, "_resolve_process_group")  # noqa: B009
    return resolve(name) if isinstance(name, str) else None


def _payload(operation: str, args: Any, group: dist.ProcessGroup | None) -> int:
    whole = group.size() if group is not None else 1
    if operation in ("scatter", "gather"):  # both ends pass their own shard; only one has all
        own = args[0] if operation == "scatter" else args[1]
        return sum(t.nbytes for t in _tensors(own)) * whole
    if operation == "all_gather_into_tensor":
        return int(args[0].nbytes) * whole
    if operation == "alltoall_base":
        return int(args[1].nbytes)
    return max((t.nbytes for t in _tensors(args)), default=0)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []
