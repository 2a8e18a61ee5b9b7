"""DeepSpeed's flops profiler counts every product of an SST layer's forward pass."""

import logging
import os
from typing import Any

import pytest
import torch
from torch import nn

from spectral_scale.backends.deepspeed.profiling import count_products_in_place, log_level
from spectral_scale.methods.sst.layer import SpectralLinear

IN, OUT, RANK, TOKENS = 12, 20, 4, 6


def counted(layer: SpectralLinear, *, seen: bool) -> int:
    """Multiply-adds of one forward pass, as DeepSpeed's profiler has them."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.profiling.flops_profiler.profiler import FlopsProfiler

    model = nn.Sequential(layer)
    if seen:
        count_products_in_place(model)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.randn(2, TOKENS // 2, IN))
    macs = int(profiler.get_total_macs())
    profiler.end_profile()
    return macs


@pytest.mark.parametrize(
    ("settings", "elements"),
    [
        ({}, IN * OUT + RANK * (IN + OUT)),
        ({"extra_sigma": 3}, IN * OUT + (RANK + 3) * (IN + OUT)),
        ({"storage": "factored"}, min(IN, OUT) * (IN + OUT)),
    ],
    ids=str,
)
def test_products_are_counted(settings: dict[str, Any], elements: int) -> None:
    layer = SpectralLinear(IN, OUT, RANK, **settings)
    layer.ready = True
    assert counted(layer, seen=True) == TOKENS * elements


def test_without_help_the_products_in_place_are_missed() -> None:
    layer = SpectralLinear(IN, OUT, RANK)
    layer.ready = True
    assert counted(layer, seen=False) == TOKENS * (IN * OUT + RANK * IN)


def test_outside_of_profiling_nothing_is_added() -> None:
    layer = SpectralLinear(IN, OUT, RANK)
    layer.ready = True
    count_products_in_place(nn.Sequential(layer))
    layer(torch.randn(TOKENS, IN))
    assert not hasattr(layer, "__flops__")


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, logging.WARNING),
        ({"flops_profiler": {"enabled": False}, "wall_clock_breakdown": False}, logging.WARNING),
        ({"comms_logger": {"enabled": True}}, logging.INFO),
        ({"wall_clock_breakdown": True}, logging.INFO),
    ],
    ids=str,
)
def test_deepspeed_is_heard_when_asked_to_speak(settings: dict[str, Any], level: int) -> None:
    assert log_level(settings) == level
