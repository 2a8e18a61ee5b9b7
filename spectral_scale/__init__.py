"""spectral_scale: pretrain language models through the spectrum of their weights.

The names below are the Python interface for a user's own model and loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_scale.backends.deepspeed.store import ZeroStore as ZeroStore
    from spectral_scale.backends.fsdp2.store import FSDP2Store as FSDP2Store
    from spectral_scale.config.schema import FilterConfig as FilterConfig
    from spectral_scale.config.schema import OptimizerConfig as OptimizerConfig
    from spectral_scale.config.schema import SpectralConfig as SpectralConfig
    from spectral_scale.methods.convert import merge as merge
    from spectral_scale.methods.frod.adapter import load_adapter as load_adapter
    from spectral_scale.methods.frod.adapter import save_adapter as save_adapter
    from spectral_scale.methods.frod.controller import FRoDController as FRoDController
    from spectral_scale.methods.frod.layer import convert_frod as convert_frod
    from spectral_scale.methods.galore.controller import galore_groups as galore_groups
    from spectral_scale.methods.galore.optimizer import GaLoreAdamW as GaLoreAdamW
    from spectral_scale.methods.lora.controller import LowRankController as LowRankController
    from spectral_scale.methods.lora.layer import convert_lora as convert_lora
    from spectral_scale.methods.sst.controller import SpectralController as SpectralController
    from spectral_scale.methods.sst.layer import convert as convert
    from spectral_scale.methods.tangent.controller import TangentController as TangentController
    from spectral_scale.methods.tangent.layer import convert_tangent as convert_tangent
    from spectral_scale.optim.filter.adamw import SpectralFilterAdamW as SpectralFilterAdamW
    from spectral_scale.optim.filter.spectral_filter import SpectralFilter as SpectralFilter
    from spectral_scale.optim.groups import param_groups as param_groups

__version__ = "0.1.0"

_EXPORTS = {
    "SpectralConfig": "spectral_scale.config.schema",
    "convert": "spectral_scale.methods.sst.layer",
    "merge": "spectral_scale.methods.convert",
    "convert_frod": "spectral_scale.methods.frod.layer",
    "load_adapter": "spectral_scale.methods.frod.adapter",
    "save_adapter": "spectral_scale.methods.frod.adapter",
    "FRoDController": "spectral_scale.methods.frod.controller",
    "param_groups": "spectral_scale.optim.groups",
    "TangentController": "spectral_scale.methods.tangent.controller",
    "convert_tangent": "spectral_scale.methods.tangent.layer",
    "SpectralController": "spectral_scale.methods.sst.controller",
    "FSDP2Store": "spectral_scale.backends.fsdp2.store",
    "ZeroStore": "spectral_scale.backends.deepspeed.store",
    "LowRankController": "spectral_scale.methods.lora.controller",
    "convert_lora": "spectral_scale.methods.lora.layer",
    "GaLoreAdamW": "spectral_scale.methods.galore.optimizer",
    "galore_groups": "spectral_scale.methods.galore.controller",
    "OptimizerConfig": "spectral_scale.config.schema",
    "FilterConfig": "spectral_scale.config.schema",
    "SpectralFilter": "spectral_scale.optim.filter.spectral_filter",
    "SpectralFilterAdamW": "spectral_scale.optim.filter.adamw",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Load an exported name on first use, so that command-line checks need not import torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
