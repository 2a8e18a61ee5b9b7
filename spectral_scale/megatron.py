"""SST inside megatron-core: layers, layer specs, and access to parameters over TP x DP.

The names below are the Python interface for a Megatron user's own script.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectral_scale.config.packages import require_package

if TYPE_CHECKING:
    from spectral_scale.backends.megatron.convert import convert_gpt as convert_gpt
    from spectral_scale.backends.megatron.convert import fresh_weights as fresh_weights
    from spectral_scale.backends.megatron.gpt_config import megatron_settings as megatron_settings
    from spectral_scale.backends.megatron.gpt_model import build_gpt_model as build_gpt_model
    from spectral_scale.backends.megatron.gpt_state import load_weights as load_weights
    from spectral_scale.backends.megatron.gpt_state import state_reader as state_reader
    from spectral_scale.backends.megatron.gpt_state import to_transformers as to_transformers
    from spectral_scale.backends.megatron.gpt_weights import megatron_weights as megatron_weights
    from spectral_scale.backends.megatron.merge import merge_gpt as merge_gpt
    from spectral_scale.backends.megatron.optimizer import spectral_optimizer as spectral_optimizer
    from spectral_scale.backends.megatron.spec import (
        spectral_gpt_block_spec as spectral_gpt_block_spec,
    )
    from spectral_scale.backends.megatron.spec import (
        spectral_gpt_layer_spec as spectral_gpt_layer_spec,
    )
    from spectral_scale.backends.megatron.store import MegatronStore as MegatronStore

_EXPORTS = {
    "convert_gpt": "spectral_scale.backends.megatron.convert",
    "fresh_weights": "spectral_scale.backends.megatron.convert",
    "megatron_settings": "spectral_scale.backends.megatron.gpt_config",
    "build_gpt_model": "spectral_scale.backends.megatron.gpt_model",
    "load_weights": "spectral_scale.backends.megatron.gpt_state",
    "state_reader": "spectral_scale.backends.megatron.gpt_state",
    "to_transformers": "spectral_scale.backends.megatron.gpt_state",
    "megatron_weights": "spectral_scale.backends.megatron.gpt_weights",
    "merge_gpt": "spectral_scale.backends.megatron.merge",
    "spectral_optimizer": "spectral_scale.backends.megatron.optimizer",
    "spectral_gpt_block_spec": "spectral_scale.backends.megatron.spec",
    "spectral_gpt_layer_spec": "spectral_scale.backends.megatron.spec",
    "MegatronStore": "spectral_scale.backends.megatron.store",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    """Load an exported name on first use; ConfigError unless a tested megatron-core is there."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_package("megatron", what=f"{__name__}.{name}")
    return getattr(import_module(_EXPORTS[name]), name)
