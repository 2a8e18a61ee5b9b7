"""The linear layer of the tangent form. It knows nothing of schedules, bases or processes."""

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.convert import replace_linears
from spectral_scale.methods.layer import FactoredLinear, ShardedProduct, in_product_dtype
from spectral_scale.methods.tangent.product import TangentProduct
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext
from spectral_scale.ops.precision import exact_products
from spectral_scale.parallel.table import Role

logger = logging.getLogger(__name__)


class TangentLinear(FactoredLinear):
    """A linear layer of weight base + u0 c^T + d v0^T, of which c and d train from zero.

    Parameters (all of fixed shape for the whole run):
        c (in, r), d (out, r): trained factors.
        bias (out,): as the dense layer's, if it has one.
        base (out, in), frozen: the weight as of the last swap.
        u0 (out, r), v0 (in, r), frozen: orthonormal columns, the bases of the present iteration.
    """

    parameter_roles: ClassVar[dict[str, Role]] = {
        "c": "factor",
        "d": "factor",
        "base": "base",
        "u0": "fixed",
        "v0": "fixed",
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spectral_rank: int,
        *,
        bias: bool = True,
        frozen_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.spectral_rank = spectral_rank

        def trained(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        def frozen(*shape: int) -> nn.Parameter:
            zeros = torch.zeros(shape, device=device, dtype=frozen_dtype or dtype)
            return nn.Parameter(zeros, requires_grad=False)

        self.c = trained(in_features, spectral_rank)
        self.d = trained(out_features, spectral_rank)
        self.bias = trained(out_features) if bias else None
        self.base = frozen(out_features, in_features)
        self.u0 = frozen(out_features, spectral_rank)
        self.v0 = frozen(in_features, spectral_rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's dtype where autocast is on, else in x's.

        Over tensor-parallel ranks: see `methods.tensor_parallel`.
        """
        if self.sharded_forward is not None:
            return self.sharded_forward(x)
        x = self.prepared(x)
        y = TangentProduct.apply(
            x.reshape(-1, self.in_features),
            self.base,
            self.c,
            self.d,
            self.u0,
            self.v0,
            self.bias,
        )
        return y.view(*x.shape[:-1], self.out_features)

    def prepared(self, x: Tensor) -> Tensor:
        """The input in the dtype of the product. Raises SpectralError before there are values."""
        if not self.ready:
            raise SpectralError(
                "a converted layer was used before its bases were installed; create the "
                "TangentController after convert_tangent() and before the first forward"
            )
        return in_product_dtype(x)

    def sharded_product(self, context: TensorParallelContext) -> ShardedProduct:
        """Column-parallel: this rank's rows of base, u0 and d; row-parallel: its columns of base
        and its rows of v0 and c."""

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            held = (self.base, self.c, self.d, self.u0, self.v0)
            y: Tensor = TangentProduct.apply(
                self.prepared(x), *map(context.local, held), bias, context
            )
            return y

        return product

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the factors the optimizer sees, however the backend shards them."""
        r = self.spectral_rank
        return {"c": (self.in_features, r), "d": (self.out_features, r)}

    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the frozen parameters, however the backend shards them."""
        m, n, r = self.out_features, self.in_features, self.spectral_rank
        return {"base": (m, n), "u0": (m, r), "v0": (n, r)}

    @torch.no_grad()
    @exact_products()
    def effective_weight(self) -> Tensor:
        """base + u0 c^T + d v0^T (out, in), in c's dtype."""
        dtype = self.c.dtype
        weight = self.u0.to(dtype) @ self.c.t() + self.d @ self.v0.to(dtype).t()
        return weight.add_(self.base)

    def extra_repr(self) -> str:
        """Shapes, as nn.Linear prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"spectral_rank={self.spectral_rank}, bias={self.bias is not None}"
        )


def convert_tangent(
    model: nn.Module,
    config: SpectralConfig,
    *,
    targets: Sequence[str] | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, TangentLinear]:
    """Replace dense linears by layers in the tangent form, in place; the new layers by fqn.

    Linears, arguments and errors are those of `convert`; a TangentController gives values.
    """

    def make(linear: nn.Linear) -> TangentLinear:
        return TangentLinear(
            linear.in_features,
            linear.out_features,
            config.spectral_rank,
            bias=linear.bias is not None,
            frozen_dtype=frozen_dtype,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    converted = replace_linears(model, config.spectral_rank, make, targets=targets)
    logger.info(
        "converted %d linear layers to the tangent form: 2 x %d vectors of each train at a time",
        len(converted),
        config.spectral_rank,
    )
    return converted


def tangent_layers(model: nn.Module) -> dict[str, TangentLinear]:
    """Converted layers by fqn, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TangentLinear)}
