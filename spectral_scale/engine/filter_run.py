"""The spectral filter in a run: its gradients on whatever backend the run has."""

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.parallel.store import ParameterStore
from spectral_scale.parallel.table import ParameterTable


def open_filter(
    config: RunConfig,
    architecture: Architecture,
    table: ParameterTable,
    store: ParameterStore,
) -> SpectralFilter | None:
    """The run's filter, or None if it has none; after the method gave all parameters values.
    Collective.

    Raises ConfigError if gradients are not reached, or if nothing can be filtered.
    """
    if not config.filter.enabled:
        return None
    shards = store.shards()
    return SpectralFilter(
        shards,
        {fqn: table[fqn].role for fqn in shards.shapes},
        config.filter,
        seed=config.train.seed,
        head_size=architecture.head_size,
    )
