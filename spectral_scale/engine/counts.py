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
    """Numbers of elements of one model."""

    trained: int
    """Elements that the optimizer trains at a time."""
    dense: int
    """Elements of the dense model that the converted one stands for."""

    @property
    def trained_fraction(self) -> float:
        """The trained elements as a fraction of the dense ones."""
        return self.trained / self.dense


def count_parameters(model: nn.Module, table: ParameterTable) -> ParameterCounts:
    """Count by logical shape, however a backend stores weights; a tied weight counts once."""
    size = {fqn: math.prod(info.global_shape) for fqn, info in table.items()}
    converted = sum(m.in_features * m.out_features for m in factored_layers(model).values())
    return ParameterCounts(
        trained=sum(size[fqn] for fqn, info in table.items() if info.trainable),
        dense=sum(size[fqn] for fqn, info in table.items() if not info.layer) + converted,
    )


def counts_of(
    architecture: Architecture, model: ModelConfig, spectral: SpectralConfig
) -> ParameterCounts:
    """Count a model converted as for training; built on the meta device, it takes no memory."""
    import torch

    from spectral_scale.engine.methods import convert_model
    from spectral_scale.models.build import build_model

    built = build_model(architecture, model, eos_token_id=None)
    convert_model(built, spectral, torch.float32)
    return count_parameters(built, parameter_table(built))
