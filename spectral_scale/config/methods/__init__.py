"""One specification a training method, in its own file; `METHOD_SPECS` names them all. No torch."""

from collections.abc import Mapping

from spectral_scale.config.methods.frod import FROD
from spectral_scale.config.methods.full import FULL
from spectral_scale.config.methods.galore import GALORE
from spectral_scale.config.methods.lora import LORA, RELORA
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.methods.sst import SST
from spectral_scale.config.methods.tangent import TANGENT
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError

METHOD_SPECS: Mapping[str, MethodSpec] = {
    spec.name: spec for spec in (FULL, SST, TANGENT, LORA, RELORA, GALORE, FROD)
}
"""Name of a method, as `method_name` gives it -> its specification."""
_FORMS = {("sst", "tangent"): "tangent"}
"""(spectral.method, spectral.form) -> the method that this form is."""


def method_name(spectral: SpectralConfig) -> str:
    """The name under which a configuration's method is found, specification and implementation
    alike: that of `spectral.method`, unless `spectral.form` is a method of its own."""
    return named_method(spectral.method, spectral.form)


def named_method(method: str, form: str | None) -> str:
    """The name that `method_name` gives, from `spectral.method` and `spectral.form` themselves."""
    return _FORMS.get((method, str(form)), method)


def chosen_spec(
    spectral: SpectralConfig, specs: Mapping[str, MethodSpec] = METHOD_SPECS
) -> MethodSpec:
    """The specification of the method that a configuration asks for. Raises ConfigError."""
    return method_spec(method_name(spectral), specs)


def method_spec(name: str, specs: Mapping[str, MethodSpec] = METHOD_SPECS) -> MethodSpec:
    """The specification of a method, from the shipped ones by default. Raises ConfigError."""
    if name not in specs:
        raise ConfigError(f"spectral.method={name} is not known; it must be one of {list(specs)}")
    return specs[name]
