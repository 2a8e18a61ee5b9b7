"""The one place that knows which backends there are; each is imported only when it is chosen."""

from importlib import import_module

import torch

from spectral_scale.backends.base import Backend
from spectral_scale.backends.megatron.gpt_config import megatron_settings
from spectral_scale.config.packages import require_package
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.models.build import transformers_config
from spectral_scale.parallel.rank_info import RankInfo

MODULES = {
    "torch": "spectral_scale.backends.torch.backend",
    "deepspeed": "spectral_scale.backends.deepspeed.backend",
    "fsdp2": "spectral_scale.backends.fsdp2.backend",
    "megatron": "spectral_scale.backends.megatron.backend",
}
"""parallel.backend -> the module whose `open_backend(run, rank_info)` starts it. Collective."""


def require_backend(config: RunConfig) -> None:
    """Raise ConfigError if the backend's package or its GPU is missing."""
    backend = config.parallel.backend
    require_package(backend, what=f"parallel.backend={backend}")
    if backend == "megatron":
        _require_gpu(config.train.device)


def require_backend_model(run: ResolvedRun) -> None:
    """Raise ConfigError if the backend has no place for an option of the model."""
    config = run.config
    if config.parallel.backend == "megatron":
        found = transformers_config(run.architecture, config.model, eos_token_id=None)
        megatron_settings(found, tensor_parallel=config.parallel.tensor_parallel)


def _require_gpu(wanted: str) -> None:
    """megatron-core works on the current GPU, whatever device its modules are on."""
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError):
        raise ConfigError(
            "parallel.backend=megatron needs a GPU, and torch sees none; set "
            "parallel.backend=fsdp2, or torch"
        ) from None
    if wanted == "cpu" and torch.cuda.is_available():
        raise ConfigError("parallel.backend=megatron runs on GPUs only; set train.device=auto")


def autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """What autocast computes in; None in full precision, or where the backend casts by itself."""
    if config.train.precision != "bf16" or config.parallel.backend == "deepspeed":
        return None
    return torch.bfloat16


def open_backend(run: ResolvedRun, rank_info: RankInfo) -> Backend:
    """Start the configured backend: process groups and device. Collective. Raises ConfigError."""
    module = import_module(MODULES[run.config.parallel.backend])
    backend: Backend = module.open_backend(run, rank_info)
    return backend
