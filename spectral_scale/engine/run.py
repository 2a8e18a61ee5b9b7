"""A run that is ready to train: its parts, and the tensors that it saves and loads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectral_scale.backends.base import Backend
from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.config.presets import Architecture
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.data.loader import TrainLoader, ValidationLoader
from spectral_scale.methods.base import MethodController
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.parallel.chunks import TensorChunk, whole
from spectral_scale.parallel.table import ParameterTable


@dataclass(kw_only=True)
class Run:
    """Everything the loop needs."""

    resolved: ResolvedRun
    """The settings and what follows from them, vocabulary included."""
    backend: Backend
    """What holds the model and takes the training step."""
    model: PreTrainedModel
    """The model itself, for evaluation and state."""
    forward: nn.Module
    """The module that the training forward pass calls."""
    table: ParameterTable
    """Logical parameters."""
    optimizer: torch.optim.Optimizer
    """The optimizer; its groups carry `name`, `fqns`, `base_lr`, `spectral`."""
    controller: MethodController | None
    """The method's actions between steps; None for dense training."""
    gradient_filter: SpectralFilter | None
    """Filter of gradients before they are clipped; None: there is none."""
    loader: TrainLoader
    """Training batches by step."""
    validation: ValidationLoader | None
    """Fixed validation batches."""
    checkpoints: CheckpointManager
    """Saves and finds checkpoints."""
    identity: dict[str, Any]
    """Settings that must be equal in a resumed run; see `engine.identity`."""
    start_step: int = 0
    """Steps already taken."""
    skipped_steps: int = 0
    """Steps among them that updated nothing, because fp16 gradients overflowed."""
    autocast: torch.dtype | None = None
    """Compute dtype of the forward pass, if it differs from the weights'."""
    saved_state: Mapping[str, Any] = field(default_factory=dict)
    """Counters of the checkpoint it goes on from; empty at step 0."""

    @property
    def config(self) -> RunConfig:
        """The settings, as resolved."""
        return self.resolved.config

    @property
    def architecture(self) -> Architecture:
        """The model's shapes."""
        return self.resolved.architecture

    def state_chunks(self) -> list[TensorChunk]:
        """The tensors that this rank saves, as views that are valid until the next step."""
        chunks = list(self.backend.state_chunks())
        if self.controller is not None:
            chunks += [whole(name, tensor) for name, tensor in self.controller.state_tensors()]
        if self.gradient_filter is not None:
            chunks += self.gradient_filter.state_chunks()
        return chunks

    def load(self, reader: CheckpointReader) -> None:
        """Take the tensors of a checkpoint, in place. Collective."""
        self.backend.load_state(reader.read)
        if self.controller is not None:
            self.controller.load_state(reader.read, reader.state["applied_steps"])
        if self.gradient_filter is not None:
            self.gradient_filter.load_state(reader.read)
