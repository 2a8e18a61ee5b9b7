"""FRoD as a method of a training run."""

import torch
from torch import nn

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.base import ControllerParts, Method, target_patterns
from spectral_scale.methods.frod.controller import FRoDController
from spectral_scale.methods.frod.layer import convert_frod


def _convert(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    return convert_frod(model, config, targets=target_patterns(config), frozen_dtype=frozen_dtype)


def _controller(parts: ControllerParts) -> FRoDController:
    return FRoDController(
        parts.model,
        parts.optimizer,
        parts.config.spectral,
        seed=parts.config.train.seed,
        collective=parts.collective,
        store=parts.store,
        weights=parts.dense_weight,
        dtype=parts.dtype,
        decompose=parts.fresh,
    )


METHOD = Method(convert=_convert, controller=_controller)
