"""SST as a method of a training run."""

import torch
from torch import nn

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.base import ControllerParts, Method, target_patterns
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.sst.layer import convert


def _convert(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    return convert(model, config, targets=target_patterns(config), frozen_dtype=frozen_dtype)


def _controller(parts: ControllerParts) -> SpectralController:
    return SpectralController(
        parts.model,
        None,  # no hooks: the loop sets the learning rates, and the store reaches the optimizer
        parts.config.spectral,
        seed=parts.config.train.seed,
        collective=parts.collective,
        store=parts.store,
        weights=parts.dense_weight,
        bank_dtype=parts.dtype,
        decompose=parts.fresh,
    )


METHOD = Method(convert=_convert, controller=_controller)
