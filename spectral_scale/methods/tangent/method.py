"""The tangent form of SST as a method of a training run."""

import torch
from torch import nn

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.base import ControllerParts, Method, target_patterns
from spectral_scale.methods.tangent.controller import TangentController
from spectral_scale.methods.tangent.layer import convert_tangent


def _convert(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    targets = target_patterns(config)
    return convert_tangent(model, config, targets=targets, frozen_dtype=frozen_dtype)


def _controller(parts: ControllerParts) -> TangentController:
    return TangentController(
        parts.model,
        None,  # no hooks: the loop sets the learning rates, and the store reaches the optimizer
        parts.config.spectral,
        seed=parts.config.train.seed,
        collective=parts.collective,
        store=parts.store,
        weights=parts.dense_weight,
        weight_dtype=parts.dtype,
        initialise=parts.fresh,
        moments=1 if parts.config.optimizer.name == "muon" else 2,
    )


METHOD = Method(convert=_convert, controller=_controller)
