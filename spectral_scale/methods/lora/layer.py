"""LoRA's linear layer (arXiv 2106.09685): a frozen weight plus a trained product of two factors.

Shape suffixes: O out_features, I in_features, R rank.
"""

import logging
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.convert import replace_linears
from spectral_scale.methods.layer import FactoredLinear
from spectral_scale.ops.keyed_random import keyed_uniform
from spectral_scale.ops.precision import exact_products
from spectral_scale.parallel.table import Role

logger = logging.getLogger(__name__)


class LoRALinear(FactoredLinear):
    """y = x base^T + scaling (x lora_a^T) lora_b^T + bias.

    Parameters (of fixed shape for the whole run):
        lora_a (r, in), lora_b (out, r): trained factors.
        bias (out,): trained, as the dense layer's, if it has one.
        base (out, in), frozen.
    """

    parameter_roles: ClassVar[dict[str, Role]] = {
        "lora_a": "factor",
        "lora_b": "factor",
        "base": "base",
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scaling: float = 1.0,
        bias: bool = True,
        frozen_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.scaling = rank, scaling

        def trained(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        self.lora_a = trained(rank, in_features)
        self.lora_b = trained(out_features, rank)
        self.bias = trained(out_features) if bias else None
        base = torch.zeros(out_features, in_features, device=device, dtype=frozen_dtype or dtype)
        self.base = nn.Parameter(base, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's dtype where autocast is on, else in x's."""
        if not self.ready:
            raise SpectralError(
                "a converted layer was used before its factors were drawn; create the "
                "LowRankController after convert_lora() and before the first forward"
            )
        update = F.linear(F.linear(x, self.lora_a) * self.scaling, self.lora_b)
        return F.linear(x, self.base, self.bias) + update

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the factors, however the backend shards them."""
        return {
            "lora_a": (self.rank, self.in_features),
            "lora_b": (self.out_features, self.rank),
        }

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """base + scaling lora_b lora_a (out, in), in the factors' dtype."""
        product = product_of_factors(self.lora_a, self.lora_b, self.scaling)
        return self.base.to(product.dtype) + product

    def extra_repr(self) -> str:
        """Shapes and scaling, as nn.Linear prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, scaling={self.scaling:g}, bias={self.bias is not None}"
        )


@exact_products()
def product_of_factors(a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """The product (out, in) that the factors add to the weight."""
    return scaling * (b_OR @ a_RI)


def draw_lora_a(shape_RI: tuple[int, int], *key: object) -> Tensor:
    """LoRA's Kaiming-uniform(a = sqrt 5) start of lora_a: U(-1/sqrt(in), 1/sqrt(in)), float64.

    A function of the shape and the key alone.
    """
    bound = 1.0 / math.sqrt(shape_RI[1])
    uniform = torch.from_numpy(keyed_uniform(math.prod(shape_RI), *key))
    return uniform.mul_(2 * bound).sub_(bound).view(shape_RI)


def convert_lora(
    model: nn.Module,
    config: SpectralConfig,
    *,
    targets: Sequence[str] | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, LoRALinear]:
    """Replace dense linears by LoRA layers, in place; returns the new layers by fqn.

    Linears, arguments and errors are those of `convert`; a LowRankController gives values.
    """

    def make(linear: nn.Linear) -> LoRALinear:
        return LoRALinear(
            linear.in_features,
            linear.out_features,
            config.spectral_rank,
            scaling=lora_scaling(config),
            bias=linear.bias is not None,
            frozen_dtype=frozen_dtype,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    converted = replace_linears(model, config.spectral_rank, make, targets=targets)
    logger.info("converted %d linear layers to rank %d", len(converted), config.spectral_rank)
    return converted


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Converted layers by fqn, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_scaling(config: SpectralConfig) -> float:
    """lora_alpha / r; 1 for auto."""
    return 1.0 if config.lora_alpha == "auto" else config.lora_alpha / config.spectral_rank
