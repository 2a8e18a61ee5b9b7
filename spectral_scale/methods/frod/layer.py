"""FRoD's linear layer (Wan et al., arXiv 2512.23485): sparse full-rank updates in a shared basis.

The U-free delta form: U is a function of the frozen weight and the category's basis, so a layer
keeps its weight alone, and starts as exactly the function it had.
"""

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_scale.config.methods.frod import entries
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.convert import replace_linears
from spectral_scale.methods.frod.product import (
    CategoryBasis,
    FRoDProduct,
    WeightShard,
    adapted_weight,
    directions,
)
from spectral_scale.methods.layer import FactoredLinear, ShardedProduct, in_product_dtype
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext
from spectral_scale.ops.precision import exact_products
from spectral_scale.parallel.table import Role

logger = logging.getLogger(__name__)


class FRoDLinear(FactoredLinear):
    """y = x (W + U (S + diag(delta)) V^T)^T + bias with W = U diag(lambda) V^T.

    Parameters (of fixed shape for the whole run):
        mixing (floor(s n^2),): trained entries of S, zero at first.
        value_delta (n,): trained change of lambda, zero at first.
        bias (out,): as the dense layer's, if it has one.
        base (out, in), frozen: W.

    A controller gives `basis` (one object for all layers of a category) and `inverse_lengths` (n,),
    1 / lambda; neither is a parameter or buffer, so that no backend casts or shards it.
    """

    parameter_roles: ClassVar[dict[str, Role]] = {
        "mixing": "mixing",
        "value_delta": "value_delta",
        "base": "mixed",
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        bias: bool = True,
        frozen_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.num_mixing = entries(in_features, sparsity)

        def trained(size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

        self.mixing = trained(self.num_mixing)
        self.value_delta = trained(in_features)
        self.bias = trained(out_features) if bias else None
        base = torch.zeros(out_features, in_features, device=device, dtype=frozen_dtype or dtype)
        self.base = nn.Parameter(base, requires_grad=False)
        self.basis: CategoryBasis | None = None
        self.inverse_lengths: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's dtype where autocast is on, else in x's.

        Over tensor-parallel ranks: see `methods.tensor_parallel`.
        """
        if self.sharded_forward is not None:
            return self.sharded_forward(x)
        basis, inverse_lengths = self.shared()
        x = in_product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):  # the weight is formed in V's precision
            y = FRoDProduct.apply(
                x.reshape(-1, self.in_features),
                self.base,
                self.mixing,
                self.value_delta,
                self.bias,
                basis,
                inverse_lengths,
            )
        return y.view(*x.shape[:-1], self.out_features)

    def shared(self) -> tuple[CategoryBasis, Tensor]:
        """The category's basis and this layer's 1 / lambda. Raises SpectralError before a
        controller has given them."""
        if not self.ready or self.basis is None or self.inverse_lengths is None:
            raise SpectralError(
                "a converted layer was used before its category was decomposed; "
                "create the FRoDController after convert_frod() and before the first forward"
            )
        return self.basis, self.inverse_lengths

    def sharded_product(self, context: TensorParallelContext) -> ShardedProduct:
        """The basis and the coefficients are whole on every rank. Column-parallel: U's rows are
        where W's are, and nothing but the gradients of the coefficients is summed. Row-parallel: U
        needs all columns of W, so that each pass sums m n elements, once."""

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            basis, inverse_lengths = self.shared()
            width = x.shape[-1]
            columns = slice(context.index * width, (context.index + 1) * width)
            y: Tensor = FRoDProduct.apply(
                x,
                *(context.local(p) for p in (self.base, self.mixing, self.value_delta)),
                bias,
                basis,
                inverse_lengths,
                WeightShard(None if context.column_parallel else columns, context.sum),
            )
            return y

        return product

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the coefficients, however the backend shards them."""
        return {"mixing": (self.num_mixing,), "value_delta": (self.in_features,)}

    @torch.no_grad()
    @exact_products()
    def effective_weight(self) -> Tensor:
        """The dense weight (out, in), in V's dtype: what a forward pass in that dtype uses."""
        basis, inverse_lengths = self.shared()
        u = directions(self.base, basis, inverse_lengths)
        return adapted_weight(self.base, u, basis, self.mixing, self.value_delta)

    def extra_repr(self) -> str:
        """Shapes, as nn.Linear prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"mixing={self.num_mixing}, bias={self.bias is not None}"
        )


def convert_frod(
    model: nn.Module,
    config: SpectralConfig,
    *,
    targets: Sequence[str] | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, FRoDLinear]:
    """Replace dense linears by FRoD layers, in place; returns the new layers by fqn.

    Linears, arguments and errors are those of `convert`; a FRoDController decomposes them.
    """

    def make(linear: nn.Linear) -> FRoDLinear:
        return FRoDLinear(
            linear.in_features,
            linear.out_features,
            sparsity=config.sparsity,
            bias=linear.bias is not None,
            frozen_dtype=frozen_dtype,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    converted = replace_linears(model, 1, make, targets=targets)
    logger.info(
        "converted %d linear layers to FRoD with %d coefficients",
        len(converted),
        sum(layer.num_mixing + layer.in_features for layer in converted.values()),
    )
    return converted


def frod_layers(model: nn.Module) -> dict[str, FRoDLinear]:
    """Converted layers by fqn, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FRoDLinear)}
