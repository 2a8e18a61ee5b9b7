"""Which layers can be computed over tensor-parallel ranks, and by which forward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spectral_scale.errors import ConfigError
from spectral_scale.methods.frod.layer import FRoDLinear
from spectral_scale.methods.frod.tensor_parallel import ShardedFRoDForward
from spectral_scale.methods.layer import FactoredLinear
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.tensor_parallel import ShardedSpectralForward
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext

ShardedForward = Callable[[Any, TensorParallelContext], Callable[[Tensor], Tensor]]
_FORMS: dict[type[FactoredLinear], ShardedForward] = {
    SpectralLinear: ShardedSpectralForward,
    FRoDLinear: ShardedFRoDForward,
}


def compute_sharded(layer: FactoredLinear, context: TensorParallelContext) -> None:
    """Let a layer compute over tensor-parallel ranks, in place; its parameters are sharded already.

    Raises ConfigError for a layer of another method.
    """
    form = _FORMS.get(type(layer))
    if form is None:
        raise ConfigError(
            f"{type(layer).__name__} has no tensor-parallel form; use spectral.method=sst, frod or "
            "full, or parallel.tensor_parallel=1"
        )
    layer.sharded_forward = form(layer, context)
