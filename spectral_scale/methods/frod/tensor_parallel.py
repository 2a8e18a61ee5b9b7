"""A FRoD layer of which each tensor-parallel rank holds rows or columns of the frozen weight.

The basis and the coefficients are whole on every rank. Column-parallel: U's rows are where W's are,
and nothing but the gradients of the coefficients is summed. Row-parallel: U needs all columns of W,
so that each pass sums m n elements, once.
"""

from torch import Tensor, autocast

from spectral_scale.methods.frod.layer import FRoDLinear
from spectral_scale.methods.frod.product import FRoDProduct, WeightPart
from spectral_scale.methods.layer import in_product_dtype
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext


class TensorParallelFRoDLinear(FRoDLinear):
    """A FRoDLinear in parts; made by `share`, never directly.

    Logical sizes and shapes stay those of the whole layer.
    """

    context: TensorParallelContext

    def forward(self, x: Tensor) -> Tensor:
        """Column-parallel: (..., in) -> (..., part of out); row-parallel: the other way round."""
        basis, inverse_lengths = self.shared()
        context, column_parallel = self.context, self.context.column_parallel
        x = context.copy_to_region(x) if column_parallel else in_product_dtype(x)
        width = x.shape[-1]
        columns = (
            None if column_parallel else slice(context.index * width, (context.index + 1) * width)
        )
        with autocast(x.device.type, enabled=False):  # the weight is formed in V's precision
            y = FRoDProduct.apply(
                x.reshape(-1, width),
                *(context.local(p) for p in (self.base, self.mixing, self.value_delta)),
                context.local(self.bias) if self.bias is not None and column_parallel else None,
                basis,
                inverse_lengths,
                WeightPart(columns, context.bottleneck.sum),
            )
            if not column_parallel:
                y = context.reduce_from_region(y)
                if self.bias is not None:
                    y = y + context.local(self.bias).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
