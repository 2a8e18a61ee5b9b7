"""LoRA and ReLoRA* as methods of a training run: the controller asks which of them it is."""

import torch
from torch import nn

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.base import ControllerParts, Method, target_patterns
from spectral_scale.methods.lora.controller import LowRankController
from spectral_scale.methods.lora.layer import convert_lora


def _convert(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    return convert_lora(model, config, targets=target_patterns(config), frozen_dtype=frozen_dtype)


def _controller(parts: ControllerParts) -> LowRankController:
    return LowRankController(
        parts.model,
        parts.optimizer,
        parts.config.spectral,
        seed=parts.config.train.seed,
        collective=parts.collective,
        store=parts.store,
        weights=parts.dense_weight,
        base_dtype=parts.dtype,
        initialise=parts.fresh,
        ramps=False,  # the loop sets the learning rates
    )


METHOD = Method(convert=_convert, controller=_controller)
