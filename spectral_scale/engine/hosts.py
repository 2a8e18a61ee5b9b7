"""The one place that knows which backends there are; each is imported only when it is chosen."""

from importlib import import_module
from importlib.util import find_spec

from spectral_scale.backends.base import Backend
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.facts import RankFacts

MODULES = {
    "torch": "spectral_scale.backends.torch",
    "deepspeed": "spectral_scale.backends.deepspeed",
    "fsdp2": "spectral_scale.backends.fsdp2",
}
"""parallel.backend -> the module whose `open_backend(config, facts)` starts it. Collective."""

PACKAGES = {"deepspeed": "deepspeed"}
"""parallel.backend -> the package it needs besides this project's dependencies."""


def require_host(config: RunConfig) -> None:
    """Raise ConfigError with the install command if the backend's package is missing."""
    backend = config.parallel.backend
    package = PACKAGES.get(backend)
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            f"parallel.backend={backend} needs the package {package}, which is not installed; "
            f"install it with: pip install 'spectral-scale[{package}]'"
        )


def open_backend(config: RunConfig, facts: RankFacts) -> Backend:
    """Start the configured backend: process groups and device. Collective. Raises ConfigError."""
    require_host(config)
    module = import_module(MODULES[config.parallel.backend])
    backend: Backend = module.open_backend(config, facts)
    return backend
