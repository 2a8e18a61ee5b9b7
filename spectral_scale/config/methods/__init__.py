"""One specification a training method, in its own file; `METHOD_SPECS` names them all. No torch."""

from collections.abc import Mapping

from spectral_scale.config.methods.frod import FROD
from spectral_scale.config.methods.full import FULL
from spectral_scale.config.methods.galore import GALORE
from spectral_scale.config.methods.lora import LORA, RELORA
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.methods.sst import SST
from spectral_scale.errors import ConfigError

METHOD_SPECS: Mapping[str, MethodSpec] = {
    spec.name: spec for spec in (FULL, SST, LORA, RELORA, GALORE, FROD)
}
"""By the name that `spectral.method` gives."""


def method_spec(name: str, specs: Mapping[str, MethodSpec] = METHOD_SPECS) -> MethodSpec:
    """The specification of a method, from the shipped ones by default. Raises ConfigError."""
    if name not in specs:
        raise ConfigError(f"spectral.method={name} is not known; it must be one of {list(specs)}")
    return specs[name]
