"""The forward pass of an SST layer of which each tensor-parallel rank holds a shard.

Column-parallel: a rank holds rows of u and residual and gives its part of the outputs.
Row-parallel: it holds rows of v and columns of the residual and takes its part of the inputs.
"""

from torch import Tensor

from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.product import SpectralProduct
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext


class ShardedSpectralForward:
    """Computes a SpectralLinear over tensor-parallel ranks; set as its `sharded_forward`.

    The layer's own sizes and shapes stay those of the whole.
    """

    def __init__(self, layer: SpectralLinear, context: TensorParallelContext) -> None:
        self._layer, self._context = layer, context

    def __call__(self, x: Tensor) -> Tensor:
        """Column-parallel: (..., in) -> (..., part of out); row-parallel: the other way round."""
        layer, context, local = self._layer, self._context, self._context.local
        column_parallel = context.column_parallel
        x = layer.prepared(context.copy_to_region(x) if column_parallel else x)
        y = SpectralProduct.apply(
            x.reshape(-1, x.shape[-1]),
            *(None if p is None else local(p) for p in (layer.residual, layer.u, layer.v)),
            *(None if p is None else local(p) for p in (layer.u_fixed, layer.v_fixed)),
            local(layer.sigma),
            local(layer.bias) if layer.bias is not None and column_parallel else None,
            layer.enhanced,
            layer.active_sigma_only,
            context.bottleneck,
        )
        if not column_parallel:
            y = context.reduce_from_region(y)
            if layer.bias is not None:
                y = y + local(layer.bias).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
