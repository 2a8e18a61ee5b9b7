"""An SST layer of which each tensor-parallel rank holds a part, whoever those ranks are.

Column-parallel: a rank holds rows of u and residual and gives its part of the outputs.
Row-parallel: it holds rows of v and columns of the residual and takes its part of the inputs.
"""

from torch import Tensor

from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.product import SpectralProduct
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext


class TensorParallelSpectralLinear(SpectralLinear):
    """A SpectralLinear in parts; made by `share`, never directly.

    Logical sizes and shapes stay those of the whole layer.
    """

    context: TensorParallelContext

    def forward(self, x: Tensor) -> Tensor:
        """Column-parallel: (..., in) -> (..., part of out); row-parallel: the other way round."""
        context, local = self.context, self.context.local
        column_parallel = context.column_parallel
        x = self._prepared(context.copy_to_region(x) if column_parallel else x)
        y = SpectralProduct.apply(
            x.reshape(-1, x.shape[-1]),
            *(None if p is None else local(p) for p in (self.residual, self.u, self.v)),
            *(None if p is None else local(p) for p in (self.u_fixed, self.v_fixed)),
            local(self.sigma),
            local(self.bias) if self.bias is not None and column_parallel else None,
            self.enhanced,
            self.active_sigma_only,
            context.bottleneck,
        )
        if not column_parallel:
            y = context.reduce_from_region(y)
            if self.bias is not None:
                y = y + local(self.bias).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
