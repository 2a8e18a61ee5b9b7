"""DeepSpeed's own measurements: heard where the JSON asks for them, and right about SST layers."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spectral_scale.methods.sst.layer import spectral_layers

MEASURES = ("flops_profiler", "comms_logger")
"""Sections with a switch `enabled`."""
REPORTS = ("wall_clock_breakdown", "memory_breakdown", "dump_state")
"""Switches of their own."""


def log_level(settings: Mapping[str, Any]) -> int:
    """How loud DeepSpeed must be for what `settings` (its configuration) switches on to appear."""
    measures = any(settings.get(key, {}).get("enabled") for key in MEASURES)
    reports = any(settings.get(key) for key in REPORTS)
    return logging.INFO if measures or reports else logging.WARNING


def count_products_in_place(model: nn.Module) -> None:
    """Let DeepSpeed's flops profiler see the products of SST layers that it misses.

    It counts by replacing torch's functions, among them the products `@` and `addmm`, but not
    `addmm_`, by which `methods.sst.product` adds to an output in place. Only active while it runs.
    """
    for layer in spectral_layers(model).values():
        layer.register_forward_hook(_add_missed)


def print_traffic(deepspeed: Any) -> None:
    """DeepSpeed's summary of the collectives that it called itself. Collective."""
    deepspeed.comm.log_summary()


def _add_missed(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if not hasattr(layer, "__flops__"):
        return
    tokens = output.numel() // layer.out_features
    columns = layer.num_fixed + (0 if layer.residual is None else layer.spectral_rank)
    macs = tokens * columns * layer.out_features
    layer.__macs__ += macs
    layer.__flops__ += 2 * macs
