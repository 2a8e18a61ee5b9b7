"""The precision and reproducibility of a run's arithmetic, set once before anything is computed."""

import logging

import torch

from spectral_scale.config.schema import TrainConfig
from spectral_scale.ops.precision import (
    describe_precision,
    set_determinism,
    set_product_precision,
)

logger = logging.getLogger(__name__)


def set_numerics(config: TrainConfig, device: torch.device) -> None:
    """Set the precision of products, and bit-reproducible kernels: free on the CPU, by request on
    GPUs, where they cost time. What is in force is logged."""
    set_product_precision(tf32=config.tf32)
    if config.deterministic or device.type == "cpu":
        set_determinism(on_cuda=device.type == "cuda")
    logger.info("numerics: %s", describe_precision())
