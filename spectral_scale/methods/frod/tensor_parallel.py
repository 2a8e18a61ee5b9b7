"""The forward pass of a FRoD layer whose frozen weight is sharded over tensor-parallel ranks.

The basis and the coefficients are whole on every rank. Column-parallel: U's rows are where W's are,
and nothing but the gradients of the coefficients is summed. Row-parallel: U needs all columns of W,
so that each pass sums m n elements, once.
"""

from torch import Tensor, autocast

from spectral_scale.methods.frod.layer import FRoDLinear
from spectral_scale.methods.frod.product import FRoDProduct, WeightPart
from spectral_scale.methods.layer import in_product_dtype
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext


class ShardedFRoDForward:
    """Computes a FRoDLinear over tensor-parallel ranks; set as its `sharded_forward`.

    The layer's own sizes and shapes stay those of the whole.
    """

    def __init__(self, layer: FRoDLinear, context: TensorParallelContext) -> None:
        self._layer, self._context = layer, context

    def __call__(self, x: Tensor) -> Tensor:
        """Column-parallel: (..., in) -> (..., part of out); row-parallel: the other way round."""
        layer, context = self._layer, self._context
        basis, inverse_lengths = layer.shared()
        column_parallel = context.column_parallel
        x = context.copy_to_region(x) if column_parallel else in_product_dtype(x)
        width = x.shape[-1]
        columns = (
            None if column_parallel else slice(context.index * width, (context.index + 1) * width)
        )
        bias = layer.bias
        with autocast(x.device.type, enabled=False):  # the weight is formed in V's precision
            y = FRoDProduct.apply(
                x.reshape(-1, width),
                *(context.local(p) for p in (layer.base, layer.mixing, layer.value_delta)),
                context.local(bias) if bias is not None and column_parallel else None,
                basis,
                inverse_lengths,
                WeightPart(columns, context.bottleneck.sum),
            )
            if not column_parallel:
                y = context.reduce_from_region(y)
                if bias is not None:
                    y = y + context.local(bias).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
