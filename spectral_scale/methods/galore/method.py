"""GaLore as a method of a training run."""

import torch
from torch import nn

from spectral_scale.config.schema import RunConfig
from spectral_scale.methods.base import ControllerParts, Method
from spectral_scale.methods.galore.controller import GaLoreController, galore_groups
from spectral_scale.methods.galore.optimizer import GaLoreAdamW
from spectral_scale.methods.galore.sharded_optimizer import ShardedGaLoreAdamW
from spectral_scale.parallel.collective import Collective


def _optimizer(
    model: nn.Module, config: RunConfig, collective: Collective
) -> torch.optim.Optimizer:
    """GaLore's AdamW in the form that fits the backend: ranks with whole gradients exchange only
    projectors, all others gather gradients on owners."""
    kind = GaLoreAdamW if config.parallel.backend == "torch" else ShardedGaLoreAdamW
    return kind(
        galore_groups(model, config.spectral, config.optimizer),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        collective=collective,
    )


def _controller(parts: ControllerParts) -> GaLoreController:
    optimizer = parts.optimizer
    if not isinstance(optimizer, GaLoreAdamW | ShardedGaLoreAdamW):
        raise TypeError(f"galore needs its own optimizer, not {type(optimizer).__name__}")
    if isinstance(optimizer, ShardedGaLoreAdamW):
        optimizer.bind(parts.store.shards())
    return GaLoreController(optimizer)


METHOD = Method(optimizer=_optimizer, controller=_controller)
