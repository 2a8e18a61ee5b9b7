"""Which keys a method uses, so that one given in vain is said aloud. No torch here."""

from dataclasses import fields
from typing import Any

from spectral_scale.config.schema import FilterConfig, RunConfig, SpectralConfig

_CONVERTED = frozenset({"spectral.targets", "spectral.train_dense"})
_LORA_KEYS = _CONVERTED | {"spectral.spectral_rank", "spectral.lora_alpha", "optimizer.spectral_lr"}
_SST_KEYS = frozenset(f"spectral.{field.name}" for field in fields(SpectralConfig)) - {
    "spectral.method",
    "spectral.settings",
    "spectral.lora_alpha",
    "spectral.sparsity",
    "spectral.ridge",
}
METHOD_KEYS: dict[str, frozenset[str]] = {
    "full": frozenset(),
    "sst": _SST_KEYS | {"optimizer.spectral_lr"},
    "lora": _LORA_KEYS,
    "relora": _LORA_KEYS
    | {
        "spectral.steps_per_iteration",
        "spectral.iteration_warmup_steps",
        "spectral.bank_device",
    },
    "frod": _CONVERTED
    | {"spectral.sparsity", "spectral.ridge", "optimizer.spectral_lr", "optimizer.value_lr"},
    "galore": frozenset(
        {
            "spectral.spectral_rank",
            "spectral.steps_per_iteration",
            "optimizer.spectral_lr",
            "optimizer.galore_scale",
        }
    ),
}
"""Method -> the keys that only some methods use and that this one does."""


def keys_without_effect(config: RunConfig) -> list[str]:
    """Keys that differ from their defaults although `spectral.method`, or a filter that is off,
    does not use them.

    They are no error, so that one file can serve several methods; a run names them at its start.
    """
    used = METHOD_KEYS[config.spectral.method]
    known = sorted(set().union(*METHOD_KEYS.values()))
    if not config.filter.enabled:
        known += [f"filter.{field.name}" for field in fields(FilterConfig)]
    default = RunConfig()
    return [key for key in known if key not in used and _get(config, key) != _get(default, key)]


def _get(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
