"""The training methods: what each does to the model, and which optimizer and controller it has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.methods.convert import convert, freeze_dense
from spectral_scale.methods.frod.controller import FRoDController
from spectral_scale.methods.frod.layer import convert_frod
from spectral_scale.methods.galore.controller import GaLoreController, galore_groups
from spectral_scale.methods.galore.optimizer import GaLoreAdamW
from spectral_scale.methods.galore.sharded_optimizer import DividedGaLoreAdamW
from spectral_scale.methods.layer import factored_layers
from spectral_scale.methods.lora.controller import LowRankController
from spectral_scale.methods.lora.layer import convert_lora
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.models.weights import InitialWeights
from spectral_scale.optim.build import build_adamw
from spectral_scale.optim.groups import param_groups
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore


class ControllerReport(Protocol):
    """What happened at a boundary."""

    def metrics(self) -> dict[str, Any]:
        """Its values by metric path."""


class MethodController(Protocol):
    """What the training loop sees of a method between two optimizer steps. Collective."""

    applied_steps: int

    def after_step(self) -> ControllerReport | None:
        """Follow one applied optimizer step; a report if a boundary took place."""

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


@dataclass(frozen=True, kw_only=True)
class ControllerParts:
    """What a controller may need of the run being built."""

    model: nn.Module
    """Converted, with memory; not wrapped."""
    optimizer: torch.optim.Optimizer
    """Already attached to the backend."""
    config: RunConfig
    """As resolved."""
    collective: Collective
    """All ranks of the run."""
    store: ParameterStore
    """How parameters are reached."""
    weights: InitialWeights
    """Initial dense weights."""
    dtype: torch.dtype
    """Of trained weights, moments and whatever must not be rounded."""
    fresh: bool
    """False when `load_state` follows."""

    def dense_weight(self, name: str) -> Tensor:
        """The initial dense weight (out, in) of a converted layer."""
        layer = factored_layers(self.model)[name]
        return self.weights.get(f"{name}.weight", (layer.out_features, layer.in_features))


@dataclass(frozen=True, kw_only=True)
class Method:
    """One choice of `spectral.method`."""

    convert: Callable[[nn.Module, SpectralConfig, torch.dtype], object] = lambda *_: None
    """Replaces linear layers of the meta model; the dtype is that of frozen weights."""
    optimizer: Callable[[nn.Module, RunConfig, Collective], torch.optim.Optimizer]
    """Its groups carry `name`, `fqns`, `base_lr`, `spectral`."""
    controller: Callable[[ControllerParts], MethodController | None] = lambda _: None
    """None if nothing happens between steps."""


def _adamw(model: nn.Module, config: RunConfig, _: Collective) -> torch.optim.Optimizer:
    groups = param_groups(
        model,
        lr=config.optimizer.lr,
        spectral_lr=config.optimizer.spectral_lr,
        weight_decay=config.optimizer.weight_decay,
        direction_lr_scaling=config.spectral.direction_lr_scaling,
        value_lr=config.optimizer.value_lr,
    )
    return build_adamw(groups, config.optimizer)


def _galore(model: nn.Module, config: RunConfig, collective: Collective) -> torch.optim.Optimizer:
    """Where ranks hold whole gradients, each needs no more than the projectors of others."""
    kind = GaLoreAdamW if config.parallel.backend == "torch" else DividedGaLoreAdamW
    return kind(
        galore_groups(model, config.spectral, config.optimizer),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        collective=collective,
    )


def _spectral_controller(parts: ControllerParts) -> SpectralController:
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


def _low_rank_controller(parts: ControllerParts) -> LowRankController:
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
    )


def _galore_controller(parts: ControllerParts) -> GaLoreController:
    optimizer = parts.optimizer
    if not isinstance(optimizer, GaLoreAdamW | DividedGaLoreAdamW):
        raise TypeError(f"galore needs its own optimizer, not {type(optimizer).__name__}")
    if isinstance(optimizer, DividedGaLoreAdamW):
        optimizer.bind(parts.store.shards())
    return GaLoreController(optimizer)


def _frod_controller(parts: ControllerParts) -> FRoDController:
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


def _convert_sst(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    return convert(model, config, targets=_targets(config), frozen_dtype=frozen_dtype)


def _convert_lora(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    return convert_lora(model, config, targets=_targets(config), frozen_dtype=frozen_dtype)


def _convert_frod(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    return convert_frod(model, config, targets=_targets(config), frozen_dtype=frozen_dtype)


def _targets(config: SpectralConfig) -> list[str] | None:
    """Patterns of module names; None for all linears of the blocks."""
    return [f"*.{name}" for name in config.targets] or None


_LORA = Method(convert=_convert_lora, optimizer=_adamw, controller=_low_rank_controller)

METHODS: dict[str, Method] = {
    "full": Method(optimizer=_adamw),
    "sst": Method(convert=_convert_sst, optimizer=_adamw, controller=_spectral_controller),
    "lora": _LORA,
    "relora": _LORA,
    "galore": Method(optimizer=_galore, controller=_galore_controller),
    "frod": Method(convert=_convert_frod, optimizer=_adamw, controller=_frod_controller),
}
"""By the name that `spectral.method` gives."""


def convert_model(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> None:
    """Make a dense meta model the one that the method trains, in place."""
    METHODS[config.method].convert(model, config, frozen_dtype)
    if not config.train_dense:
        freeze_dense(model, frozen_dtype)
