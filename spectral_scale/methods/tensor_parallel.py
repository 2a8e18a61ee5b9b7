"""Layers in parts: which methods have a tensor-parallel form."""

from typing import Any

from spectral_scale.errors import ConfigError
from spectral_scale.methods.frod.layer import FRoDLinear
from spectral_scale.methods.frod.tensor_parallel import TensorParallelFRoDLinear
from spectral_scale.methods.layer import FactoredLinear
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.tensor_parallel import TensorParallelSpectralLinear
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext

_FORMS: dict[type[FactoredLinear], type[FactoredLinear]] = {
    SpectralLinear: TensorParallelSpectralLinear,
    FRoDLinear: TensorParallelFRoDLinear,
}


def share(layer: FactoredLinear, context: TensorParallelContext) -> None:
    """Let a layer compute in parts, in place; its parameters must have been cut already.

    Raises ConfigError for a layer of another method.
    """
    form = _FORMS.get(type(layer))
    if form is None:
        raise ConfigError(
            f"{type(layer).__name__} has no tensor-parallel form; use spectral.method=sst, frod or "
            "full, or parallel.tensor_parallel=1"
        )
    shared: Any = layer
    shared.__class__ = form
    shared.context = context
