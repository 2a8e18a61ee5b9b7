"""How the ranks that each hold a part of a layer work together, whoever those ranks are."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spectral_scale.methods.layer import in_product_dtype
from spectral_scale.methods.sst.product import Bottleneck


class SharedInput:
    """The input of the layers of one parent module, of which several may take the same: it enters
    once, so that one sum over ranks completes the gradients of all of them.

    Args:
        copy_to_region: makes the gradient of a tensor a sum over ranks.

    `forget` when the parent's forward pass ends.
    """

    def __init__(self, copy_to_region: Callable[[Tensor], Tensor]) -> None:
        self._copy_to_region = copy_to_region
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x in the product's precision, as a tensor that all who give the same x share."""
        if self._last is None or self._last[0] is not x:
            self._last = x, self._copy_to_region(in_product_dtype(x))
        return self._last[1]

    def forget(self, *_: object) -> None:
        """Keep nothing alive; a forward hook."""
        self._last = None


@dataclass(frozen=True)
class TensorParallelContext:
    """What a layer in parts needs of its ranks."""

    bottleneck: Bottleneck
    """Which sharding it is, and the sum that completes what is partial inside the product."""
    copy_to_region: Callable[[Tensor], Tensor]
    """The input, equal on all ranks, in the product's precision; its gradient is summed over
    them."""
    reduce_from_region: Callable[[Tensor], Tensor]
    """The sum over ranks; its gradient, equal on all ranks, goes to each."""
    local: Callable[[Tensor], Tensor]
    """This rank's part of a parameter, differentiably."""
    index: int = 0
    """This rank's place among them."""

    @property
    def column_parallel(self) -> bool:
        """Whether ranks hold different outputs; otherwise the layer is row-parallel."""
        return self.bottleneck.sharding == "column_parallel"
