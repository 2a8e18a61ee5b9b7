"""Sparse Spectral Training in a loop of one's own under accelerate, with its checkpoints."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from spectral_scale import SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.parallel.group import present_group


def prepare(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> tuple:
    """Convert a model and prepare all parts; the controller is saved and loaded with them."""
    config = SpectralConfig(spectral_rank=8, steps_per_iteration=5)
    convert(model, config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, spectral_lr=1e-3))
    wrapped, stepper, loader = accelerator.prepare(model, optimizer, loader)
    controller = SpectralController(model, optimizer, config, collective=present_group())
    accelerator.register_for_checkpointing(controller)
    return wrapped, stepper, loader, controller


def train(parts: tuple, accelerator: Accelerator) -> list[float]:
    """One pass over the loader; the losses."""
    model, optimizer, loader, controller = parts
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and not optimizer.step_was_skipped:
            controller.after_step()  # once for every applied optimizer step
        losses.append(loss.item())
    return losses
