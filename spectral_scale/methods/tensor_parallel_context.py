"""What the tensor-parallel ranks of a layer know of each other, on any backend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Sharding = Literal["column_parallel", "row_parallel"]
"""Ranks hold different outputs of a layer (column_parallel), or different inputs (row_parallel)."""

StartSum = Callable[[Tensor], Callable[[], Tensor]]
"""Starts the sum of a tensor over ranks and returns at once; what it returns waits for the sum, a
new tensor. All ranks start their sums in the same order."""


@dataclass(frozen=True, kw_only=True)
class TensorParallelContext:
    """The sharding of a layer and the operations over ranks that computing it needs."""

    sharding: Sharding
    """Whether the layer's outputs or its inputs are sharded."""
    index: int
    """This rank's index in the tensor-parallel group."""
    start_sum: StartSum
    """Starts the sum over ranks of what is partial inside the product, without a gradient."""
    copy_to_region: Callable[[Tensor], Tensor]
    """Casts the input, equal on all ranks, to the product's precision, and sums its gradient over
    ranks."""
    reduce_from_region: Callable[[Tensor], Tensor]
    """Sums a tensor over ranks; the gradient, equal on all ranks, goes to each."""
    local: Callable[[Tensor], Tensor]
    """Takes this rank's shard of a parameter, differentiably."""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks of what is partial inside the product, as a new tensor without a
        gradient."""
        return self.start_sum(partial)()

    @property
    def column_parallel(self) -> bool:
        """True if ranks hold different outputs; otherwise the layer is row-parallel."""
        return self.sharding == "column_parallel"
