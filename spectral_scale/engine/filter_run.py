"""The spectral filter in a run: its gradients on whatever host the run has."""

from torch import nn

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig
from spectral_scale.engine.pieces import shards_of
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.parallel.flat_shards import ParameterShards, ShardsMaker
from spectral_scale.parallel.store import ParameterStore
from spectral_scale.parallel.table import ParameterTable


def open_filter(
    config: RunConfig,
    architecture: Architecture,
    model: nn.Module,
    table: ParameterTable,
    store: ParameterStore,
) -> SpectralFilter | None:
    """The run's filter, or None if it has none; after the method gave all parameters values.
    Collective.

    Raises ConfigError for a host whose gradients are not reached, or if nothing can be filtered.
    """
    if not config.filter.enabled:
        return None
    pieces: ParameterShards
    if isinstance(store, ShardsMaker):
        pieces = store.shards()
    else:
        pieces = shards_of(store, model, what="the spectral filter", remedy="set filter.kind=none")
    return SpectralFilter(
        pieces,
        {fqn: table[fqn].role for fqn in pieces.shapes},
        config.filter,
        seed=config.train.seed,
        head_size=architecture.head_size,
    )
