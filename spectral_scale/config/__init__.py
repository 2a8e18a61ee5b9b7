"""Configuration: schema, presets, loading, checks. Imports no torch."""

from spectral_scale.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SpectralConfig,
    TrainConfig,
)
from spectral_scale.config.schema_supervision import MetricsConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "SpectralConfig",
    "TrainConfig",
]
