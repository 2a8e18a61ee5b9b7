"""The forward pass of a layer over tensor-parallel ranks, the same for every method.

A method says what a rank computes of its shard (`FactoredLinear.sharded_product`); here stands what
happens around it. Column-parallel: a rank has all inputs and gives its shard of the outputs.
Row-parallel: it has its shard of the inputs and gives a summand of all outputs.
"""

from collections.abc import Callable

from torch import Tensor, autocast

from spectral_scale.methods.layer import FactoredLinear, in_product_dtype
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext


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


class ShardedForward:
    """Computes a layer over tensor-parallel ranks; set as its `sharded_forward`.

    The layer's own sizes and shapes stay those of the whole.

    Args:
        layer: its parameters are sharded as `parallel.tensor_parallel_table` says.
        context: the ranks and their operations.

    Raises ConfigError for a layer whose method has no tensor-parallel form.
    """

    def __init__(self, layer: FactoredLinear, context: TensorParallelContext) -> None:
        self._layer, self._context = layer, context
        self._product = layer.sharded_product(context)

    def __call__(self, x: Tensor) -> Tensor:
        """Column-parallel: (..., in) -> (..., shard of out); row-parallel: (..., shard of in) ->
        (..., out)."""
        context, bias = self._context, self._layer.bias
        column_parallel = context.column_parallel
        x = context.copy_to_region(x) if column_parallel else in_product_dtype(x)
        inside = context.local(bias) if bias is not None and column_parallel else None
        with autocast(x.device.type, enabled=False):  # x has the product's dtype already
            y = self._product(x.reshape(-1, x.shape[-1]), inside)
            if not column_parallel:
                y = context.reduce_from_region(y)
                if bias is not None:  # once, not by every rank
                    y = y + context.local(bias).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
