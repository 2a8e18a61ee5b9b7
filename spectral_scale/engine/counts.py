"""Trained parameters of a model under a method, counted on the converted model itself."""

import math
from dataclasses import dataclass

from torch import nn

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import ModelConfig, SpectralConfig
from spectral_scale.methods.layer import factored_layers
from spectral_scale.parallel.table import ParameterTable, parameter_table


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Elements of one model."""

    trained: int
    """What the optimizer sees at a time."""
    dense: int
    """The dense model it stands for."""

    @property
    def share(self) -> float:
        """trained / dense."""
        return self.trained / self.dense


def count_parameters(model: nn.Module, table: ParameterTable) -> ParameterCounts:
    """Counts by logical shape, whatever a host did to the storage; a shared weight counts once."""
    size = {fqn: math.prod(info.global_shape) for fqn, info in table.items()}
    converted = sum(m.in_features * m.out_features for m in factored_layers(model).values())
    return ParameterCounts(
        trained=sum(size[fqn] for fqn, info in table.items() if info.trainable),
        dense=sum(size[fqn] for fqn, info in table.items() if not info.layer) + converted,
    )


def counts_of(
    architecture: Architecture, model: ModelConfig, spectral: SpectralConfig
) -> ParameterCounts:
    """Counts of a model converted as training converts it, on the meta device: no memory."""
    import torch

    from spectral_scale.engine.methods import convert_model
    from spectral_scale.models.build import build_model

    built = build_model(architecture, model, eos_token_id=None)
    convert_model(built, spectral, torch.float32)
    return count_parameters(built, parameter_table(built))
