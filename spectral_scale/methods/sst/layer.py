"""The Sparse Spectral Training linear layer (arXiv 2405.15481).

Knows nothing of schedules, banks, optimizers or processes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_scale.config.methods.sst import trains_all_sigma
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.convert import replace_linears
from spectral_scale.methods.frozen_weight import widened
from spectral_scale.methods.layer import FactoredLinear, ShardedProduct
from spectral_scale.methods.sst.casts import CastCache, Factors
from spectral_scale.methods.sst.forward import spectral_forward
from spectral_scale.methods.sst.product import Bottleneck
from spectral_scale.methods.sst.shared_input import InputMember, SharedInput, with_one_input
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext
from spectral_scale.ops.precision import exact_products
from spectral_scale.parallel.table import Role

logger = logging.getLogger(__name__)


class SpectralLinear(FactoredLinear):
    """A linear layer of which r singular triplets train at a time.

    Parameters (all of fixed shape for the whole run):
        u (out, r), v (in, r): trained directions, unit columns.
        sigma (r + s,), or (k,) in factored storage: singular values, those of u and v first.
        bias (out,): as the dense layer's, if it has one.
        residual (out, in), frozen: everything not trained (residual storage), rounded to
            `frozen_dtype`, or to whole numbers (int8).
        residual_scale (out,), frozen, fp32: the scale of each row of whole numbers (`ops.int8`).
        u_fixed (out, f), v_fixed (in, f), frozen: directions of which at most sigma trains; all
            f = k - r others in factored storage, f = s extra ones in residual storage, if any.
    """

    parameter_roles: ClassVar[dict[str, Role]] = {
        "u": "direction",
        "v": "direction",
        "sigma": "value",
        "residual": "residual",
        "residual_scale": "residual",
        "u_fixed": "fixed",
        "v_fixed": "fixed",
    }
    residual: nn.Parameter | None
    residual_scale: nn.Parameter | None
    u_fixed: nn.Parameter | None
    v_fixed: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spectral_rank: int,
        *,
        storage: str = "residual",
        residual_dtype: str = "auto",
        extra_sigma: int = 0,
        enhanced: bool = True,
        active_sigma_only: bool = False,
        bias: bool = True,
        frozen_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.spectral_rank = spectral_rank
        self.enhanced, self.active_sigma_only = enhanced, active_sigma_only
        self.casts: CastCache | None = None
        """Keeps cast factors between micro-batches, where a controller says that it is safe."""
        self.member: InputMember | None = None
        """Casts its input together with layers that read the same, where casts are kept."""
        k = min(in_features, out_features)

        def trained(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        def frozen(
            *shape: int, kept_in: torch.dtype | None = frozen_dtype or dtype
        ) -> nn.Parameter:
            zeros = torch.zeros(shape, device=device, dtype=kept_in)
            return nn.Parameter(zeros, requires_grad=False)

        self.u = trained(out_features, spectral_rank)
        self.v = trained(in_features, spectral_rank)
        in_residual = storage == "residual"
        self.num_fixed = extra_sigma if in_residual else k - spectral_rank
        self.sigma = trained(spectral_rank + self.num_fixed)
        self.bias = trained(out_features) if bias else None
        self.residual = self.residual_scale = None
        if in_residual and residual_dtype == "int8":
            self.residual = frozen(out_features, in_features, kept_in=torch.int8)
            self.residual_scale = frozen(out_features, kept_in=torch.float32)
        elif in_residual:
            self.residual = frozen(out_features, in_features)
        holds_fixed = self.num_fixed > 0 or not in_residual
        self.u_fixed = frozen(out_features, self.num_fixed) if holds_fixed else None
        self.v_fixed = frozen(in_features, self.num_fixed) if holds_fixed else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's dtype where autocast is on, else in x's.

        Over tensor-parallel ranks: see `methods.tensor_parallel`.
        """
        if self.sharded_forward is not None:
            return self.sharded_forward(x)
        return self.product(x, self.factors())

    def factors(self, *, local: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Factors:
        """The parameters that the product takes, or `local` of each."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else local(tensor)

        return Factors(
            residual=of(self.residual),
            residual_scale=of(self.residual_scale),
            u=local(self.u),
            v=local(self.v),
            u_fixed=of(self.u_fixed),
            v_fixed=of(self.v_fixed),
            sigma=local(self.sigma),
            bias=of(self.bias),
        )

    def product(self, x: Tensor, factors: Factors, bottleneck: Bottleneck | None = None) -> Tensor:
        """(..., in) -> (..., out) with given factors; see `spectral_forward`.

        Raises SpectralError before there are values.
        """
        if not self.ready:
            raise SpectralError(
                "a converted layer was used before its triplets were installed; "
                "create the SpectralController after convert() and before the first forward"
            )
        return spectral_forward(
            x,
            factors,
            enhanced=self.enhanced,
            active_sigma_only=self.active_sigma_only,
            bottleneck=bottleneck,
            casts=self.casts,
            member=self.member,
        )

    def sharded_product(self, context: TensorParallelContext) -> ShardedProduct:
        """Column-parallel: this rank's rows of u and of the residual; row-parallel: its rows of v
        and columns of the residual."""
        bottleneck, local = Bottleneck(context.sharding, context.start_sum), context.local

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            return self.product(x, replace(self.factors(local=local), bias=bias), bottleneck)

        return product

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the factors the optimizer sees, however the backend shards them."""
        r = self.spectral_rank
        sigma = (r + self.num_fixed,)
        return {"u": (self.out_features, r), "v": (self.in_features, r), "sigma": sigma}

    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the frozen parameters, however the backend shards them."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.u_fixed is not None:
            shapes["u_fixed"] = (self.out_features, self.num_fixed)
            shapes["v_fixed"] = (self.in_features, self.num_fixed)
        if self.residual is not None:
            shapes["residual"] = (self.out_features, self.in_features)
        if self.residual_scale is not None:
            shapes["residual_scale"] = (self.out_features,)
        return shapes

    @torch.no_grad()
    @exact_products()
    def effective_weight(self) -> Tensor:
        """The dense weight (out, in) this layer stands for, in u's dtype."""
        r = self.spectral_rank
        weight = (self.u * self.sigma[:r]) @ self.v.t()
        if self.residual is not None:
            weight += widened(self.residual, self.residual_scale, weight.dtype)
        if self.u_fixed is not None and self.v_fixed is not None:
            dtype = weight.dtype
            weight += (self.u_fixed.to(dtype) * self.sigma[r:]) @ self.v_fixed.t().to(dtype)
        return weight

    def extra_repr(self) -> str:
        """Shapes and storage, as nn.Linear prints its own."""
        storage = "residual" if self.residual is not None else "factored"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"spectral_rank={self.spectral_rank}, storage={storage}, bias={self.bias is not None}"
        )


def convert(
    model: nn.Module,
    config: SpectralConfig,
    *,
    targets: Sequence[str] | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, SpectralLinear]:
    """Replace dense linears by spectral layers, in place; returns the new layers by fqn.

    Works on meta models (weights are supplied later) and on real ones (each dense weight waits on
    its layer until a SpectralController decomposes it).

    Args:
        model: converted in place.
        config: rank, storage and gradient form.
        targets: fnmatch patterns of module names; None takes every nn.Linear, and every Conv1D of
            GPT-2, inside a numbered block (`...layers.3.fc1`), which leaves embeddings and output
            layers dense.
        frozen_dtype: dtype of the frozen weights, unless `config` asks for another one of the
            residual; None: that of the dense weight.

    Raises:
        ConfigError: a pattern or the model yields no linear, a weight is tied, or r is too large.
    """

    def make(linear: nn.Linear) -> SpectralLinear:
        return SpectralLinear(
            linear.in_features,
            linear.out_features,
            config.spectral_rank,
            storage=config.storage,
            residual_dtype=config.residual_dtype,
            extra_sigma=config.extra_sigma,
            enhanced=config.gradient == "enhanced",
            active_sigma_only=not trains_all_sigma(config) and not config.extra_sigma,
            bias=linear.bias is not None,
            frozen_dtype=frozen_dtype,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    converted = replace_linears(model, config.spectral_rank, make, targets=targets)
    logger.info(
        "converted %d linear layers: %d triplets train at a time (%s storage)",
        len(converted),
        len(converted) * config.spectral_rank,
        config.storage,
    )
    return converted


def keep_casts(layers: Mapping[str, SpectralLinear]) -> None:
    """Let layers keep cast factors from one pass to the next, and cast common inputs together.

    Args:
        layers: by fqn; their parameters must lie whole in this rank's memory between passes.
    """
    caches = {name: CastCache() for name in layers}
    for name, layer in layers.items():
        layer.casts = caches[name]
    for group in with_one_input(list(layers)):
        shared = SharedInput([(layers[name].factors, caches[name]) for name in group])
        for place, name in enumerate(group):
            layers[name].member = InputMember(shared, place)


def forget_casts(layers: Mapping[str, SpectralLinear]) -> None:
    """Have factors cast again in the next pass, because parameters were or will be written to."""
    for layer in layers.values():
        if layer.casts is not None:
            layer.casts.clear()
        if layer.member is not None:
            layer.member.shared.clear()


def spectral_layers(model: nn.Module) -> dict[str, SpectralLinear]:
    """Converted layers by fqn, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SpectralLinear)}
