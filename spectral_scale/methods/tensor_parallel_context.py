"""The context in which the tensor-parallel ranks of a layer work together, on any backend."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spectral_scale.methods.layer import in_product_dtype
from spectral_scale.methods.sst.product import Bottleneck


class CommonInput:
    """The common input of several layers of one parent module.

    It enters the tensor-parallel region once, so that one sum over ranks completes the gradients of
    all layers that take it.

    Args:
        copy_to_region: makes the gradient of a tensor a sum over ranks.

    `forget` when the parent's forward pass ends.
    """

    def __init__(self, copy_to_region: Callable[[Tensor], Tensor]) -> None:
        self._copy_to_region = copy_to_region
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x in the product's precision; calls with one x return one tensor."""
        if self._last is None or self._last[0] is not x:
            self._last = x, self._copy_to_region(in_product_dtype(x))
        return self._last[1]

    def forget(self, *_: object) -> None:
        """Keep nothing alive; a forward hook."""
        self._last = None


@dataclass(frozen=True)
class TensorParallelContext:
    """The operations over ranks that a sharded layer needs."""

    bottleneck: Bottleneck
    """The sharding, and the sum that completes what is partial inside the product."""
    copy_to_region: Callable[[Tensor], Tensor]
    """Casts the input, equal on all ranks, to the product's precision, and sums its gradient over
    ranks."""
    reduce_from_region: Callable[[Tensor], Tensor]
    """Sums a tensor over ranks; the gradient, equal on all ranks, goes to each."""
    local: Callable[[Tensor], Tensor]
    """Takes this rank's shard of a parameter, differentiably."""
    index: int = 0
    """This rank's index in the tensor-parallel group."""

    @property
    def column_parallel(self) -> bool:
        """True if ranks hold different outputs; otherwise the layer is row-parallel."""
        return self.bottleneck.sharding == "column_parallel"
