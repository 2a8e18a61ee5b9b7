"""What the linear layers of all methods have in common, for merging and counting."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext
from spectral_scale.ops.autocast import product_dtype

ShardedProduct = Callable[[Tensor, Tensor | None], Tensor]
"""(inputs (tokens, in), bias or None) -> outputs (tokens, out), of a rank's shard of a layer."""


class WeightFacts(Tensor):
    """Answers what a dense weight's shape, dtype and device would be; it has no values.

    Model code asks its linears for them (T5 compares `wo.weight.dtype`, Mamba-2 looks at
    `in_proj.weight.device`). Whoever needs values gets a SpectralError instead of wrong numbers.
    """

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> "WeightFacts":
        """A tensor without storage."""
        made: WeightFacts = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Facts only, as there is nothing else."""
        return f"WeightFacts(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Every operation on values ends here."""
        raise SpectralError(
            f"{function} was asked for the values of a converted layer's weight, which exist as "
            "factors only; take the layer's effective_weight(), or leave the layer dense by "
            "naming others in targets="
        )


class FactoredLinear(nn.Module):
    """A linear layer (in -> out) whose dense weight is held as trained factors and a frozen rest.

    Its parameters declare their roles in a class attribute `parameter_roles`. A controller gives
    the factors their first values and sets `ready`.
    """

    merged_by: ClassVar[str | None] = None
    """The function that makes it dense again, where `merge` cannot."""
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.initial_weight: Tensor | None = None
        self.ready = False
        self.sharded_forward: Callable[[Tensor], Tensor] | None = None
        """The forward pass over tensor-parallel ranks, where they hold shards of the layer."""
        self.dense_kind: type[nn.Module] = nn.Linear
        """What the layer was before it was converted, and is again when it is merged."""

    @property
    def weight(self) -> WeightFacts:
        """Shape (out, in), dtype and device of the weight this layer stands for, without values."""
        factor = getattr(self, next(iter(self.trained_shapes())))
        return WeightFacts(
            (self.out_features, self.in_features), dtype=factor.dtype, device=factor.device
        )

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the factors the optimizer sees, however the backend shards them."""
        raise NotImplementedError

    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the frozen parameters that owners send, whatever a host did to them."""
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """The dense weight (out, in) this layer stands for, in the trained factors' dtype."""
        raise NotImplementedError

    def sharded_product(self, context: TensorParallelContext) -> ShardedProduct:
        """What a tensor-parallel rank computes of its shard; `methods.tensor_parallel` calls it.

        Column-parallel: all inputs -> the rank's outputs; no bias is handed over if the layer has
        none. Row-parallel: the rank's inputs -> its summand of all outputs, never with a bias. The
        gradients of parameters that every rank holds whole must come out complete and equal.

        Raises ConfigError if the method has no tensor-parallel form (`MethodSpec.tensor_parallel`).
        """
        raise ConfigError(
            f"{type(self).__name__} has no tensor-parallel form; use another spectral.method, or "
            "parallel.tensor_parallel=1"
        )


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """Converted layers of any method by fqn, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}


def weights_set_aside(layers: Mapping[str, FactoredLinear]) -> Callable[[str], Tensor]:
    """The dense weights that conversion left on real layers, by layer name.

    The returned function raises SpectralError for a layer without one.
    """

    def weight(name: str) -> torch.Tensor:
        found = layers[name].initial_weight
        if found is None:
            raise SpectralError(
                f"{name} has no initial weight: it was converted on the meta device, "
                "so give weights=, or another controller has already taken it"
            )
        return found

    return weight


def in_product_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on."""
    return x.to(product_dtype(x))
