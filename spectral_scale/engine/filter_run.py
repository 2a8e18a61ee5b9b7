"""The spectral filter in a run: its gradients on whatever host the run has."""

from torch import nn

from spectral_scale.backends.zero_pieces import ZeroPieces
from spectral_scale.backends.zero_store import ZeroStore
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.parallel.fsdp2_store import FSDP2Store
from spectral_scale.parallel.pieces import Pieces, TensorPieces
from spectral_scale.parallel.store import ParameterStore, TorchStore
from spectral_scale.parallel.table import ParameterTable


def open_filter(
    config: RunConfig,
    architecture: Architecture,
    model: nn.Module,
    table: ParameterTable,
    store: ParameterStore,
) -> SpectralFilter | None:
    """The run's filter, or None if it has none; after the method gave all parameters values.

    Raises ConfigError for a host whose gradients are not reached, or if nothing can be filtered.
    """
    if not config.filter.enabled:
        return None
    pieces = _pieces(store, model)
    return SpectralFilter(
        pieces,
        {fqn: table[fqn].role for fqn in pieces.shapes},
        config.filter,
        seed=config.train.seed,
        head_size=architecture.head_size,
    )


def _pieces(store: ParameterStore, model: nn.Module) -> Pieces:
    if isinstance(store, ZeroStore):
        return ZeroPieces(store)
    if isinstance(store, TorchStore | FSDP2Store):
        return TensorPieces({n: p for n, p in model.named_parameters() if p.requires_grad})
    raise ConfigError(
        f"the spectral filter does not reach the gradients behind {type(store).__name__}; set "
        "filter.kind=none, or parallel.backend to torch, fsdp2 or deepspeed"
    )
