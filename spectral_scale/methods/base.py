"""A training method at run time: `Method`, and the controller that it may open.

Each method's folder exports one `METHOD`; `config.methods` holds its torch-free counterpart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.methods.convert import find_targets
from spectral_scale.methods.layer import factored_layers
from spectral_scale.optim.build import build_adamw
from spectral_scale.optim.groups import param_groups
from spectral_scale.optim.muon import build_muon
from spectral_scale.optim.scale import build_scale
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore


class ControllerReport(Protocol):
    """The report of a swap, merge or renewal."""

    def metrics(self) -> dict[str, Any]:
        """The report's values by metric path."""


class MethodController(Protocol):
    """A method as the training loop sees it between two optimizer steps. Collective."""

    applied_steps: int

    def after_step(self) -> ControllerReport | None:
        """Follow one applied optimizer step; a report if something was swapped."""

    def lr_factor(self) -> float:
        """Factor on the learning rate of groups marked `spectral` in the next step; the loop sets
        it."""

    def nbytes(self) -> int:
        """Bytes this rank keeps besides weights, gradients and optimizer state."""

    def describe(self) -> str:
        """One line for a person."""

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors this rank saves, by checkpoint name."""

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Take over a checkpoint."""


@runtime_checkable
class FollowsOpenSteps(Protocol):
    """A controller that can follow a step of which only the device knows whether it was applied.

    It spares the GPU a wait in every step; a controller without these methods is told of applied
    steps only, once they are known.
    """

    def needs_verdict(self) -> bool:
        """Whether `after_step` of the coming step must know that it was applied, as a swap must."""

    def after_step(self, left_out: Tensor | None = None) -> ControllerReport | None:
        """Follow one step; if `left_out` (0-dim, on the device) is 1, change no tensor by a bit.

        The caller takes the step off `applied_steps` when it learns that it was left out.
        """


@dataclass(frozen=True, kw_only=True)
class ControllerParts:
    """The parts of the run being built that a controller may need."""

    model: nn.Module
    """The converted model, with memory; not wrapped."""
    optimizer: torch.optim.Optimizer
    """The optimizer, attached to the backend. A controller reads it and registers no hook on it."""
    config: RunConfig
    """The resolved configuration."""
    collective: Collective
    """All ranks of the run."""
    store: ParameterStore
    """Access to the parameters, however the backend shards them."""
    dense_weight: Callable[[str], Tensor]
    """The initial dense weight (out, in) of a converted layer, by its name."""
    dtype: torch.dtype
    """The dtype of trained weights, moments and whatever must not be rounded."""
    fresh: bool
    """False when `load_state` follows."""


def standard_optimizer(model: nn.Module, config: RunConfig, _: Collective) -> torch.optim.Optimizer:
    """The optimizer of most methods over the groups of `param_groups`: AdamW; Muon for factors
    (for the blocks' linears, where no method converted any) or SCALE for all dense matrices, and
    AdamW for the rest."""
    groups = param_groups(
        model,
        lr=config.optimizer.lr,
        spectral_lr=config.optimizer.spectral_lr,
        weight_decay=config.optimizer.weight_decay,
        spectral_weight_decay=config.optimizer.spectral_weight_decay,
        direction_lr_scaling=config.spectral.direction_lr_scaling,
        value_lr=config.optimizer.value_lr,
    )
    if config.optimizer.name == "muon":
        dense = [] if factored_layers(model) else find_targets(model)
        matrices = {f"{name}.weight" for name in dense}
        return build_muon(groups, config.optimizer, matrices=matrices)
    if config.optimizer.name == "scale":
        return build_scale(groups, config.optimizer, last=output_weight(model))
    return build_adamw(groups, config.optimizer)


def output_weight(model: nn.Module) -> str:
    """The fqn of the output layer's weight; of the embedding that it is tied to, if it is."""
    head = cast(Any, model).get_output_embeddings().weight  # a transformers model's
    return next(fqn for fqn, parameter in model.named_parameters() if parameter is head)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One choice of `spectral.method`."""

    convert: Callable[[nn.Module, SpectralConfig, torch.dtype], object] = lambda *_: None
    """Replaces linear layers of the meta model; the dtype is that of frozen weights."""
    optimizer: Callable[[nn.Module, RunConfig, Collective], torch.optim.Optimizer] = (
        standard_optimizer
    )
    """Builds the optimizer, whose groups carry `name`, `fqns`, `base_lr`, `spectral`."""
    controller: Callable[[ControllerParts], MethodController | None] = lambda _: None
    """Opens the controller; returns None if nothing happens between steps."""


def target_patterns(config: SpectralConfig) -> list[str] | None:
    """Patterns of the names of modules to convert; None for all linears of the blocks."""
    return [f"*.{name}" for name in config.targets] or None
