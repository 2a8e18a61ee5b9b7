"""Rules of the `filter` section of a run. No torch here."""

import math
from collections.abc import Iterator

from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import FilterConfig, RunConfig


def filter_problems(
    config: RunConfig, architecture: Architecture, spec: MethodSpec
) -> Iterator[str]:
    """Everything that is wrong with the filter of a run."""
    settings = config.filter
    if not settings.enabled:
        return
    yield from _range_problems(settings)
    yield from _pair_problems(settings)
    spectral = config.spectral
    dense_left = spec.converts and bool(spectral.targets) and spectral.train_dense
    why = spec.filter_refusals.get(settings.nodes)
    if why and not dense_left:
        given = f"filter.nodes={settings.nodes} with spectral.method={spectral.method}"
        yield f"{given} finds nothing to filter: {why}"
    if settings.nodes == "layers" and architecture.num_layers < 2:
        yield "filter.nodes=layers needs two layers or more; the model has one: use rows or heads"
    if config.train.precision == "fp16":
        yield (
            "filter: a change of fp16's loss scale would enter the mean gradients; set "
            "train.precision=bf16"
        )


def _range_problems(settings: FilterConfig) -> Iterator[str]:
    numbers = {"strength": settings.strength, "joint_loss_mu": settings.joint_loss_mu}
    for key, number in numbers.items():
        if not (number >= 0 and math.isfinite(number)):
            yield f"filter.{key}={number} must be finite and at least 0"
    for key, least in (("neighbors", 1), ("refresh_steps", 1), ("anchor_steps", 0)):
        if getattr(settings, key) < least:
            yield f"filter.{key}={getattr(settings, key)} must be at least {least}"
    if not 0 <= settings.gradient_decay < 1:
        yield f"filter.gradient_decay={settings.gradient_decay} must lie in [0, 1)"


def _pair_problems(settings: FilterConfig) -> Iterator[str]:
    """Settings that contradict each other."""
    if settings.norm_matched and settings.joint_loss_mu:
        yield "filter.norm_matched is a control of the filter alone; set filter.joint_loss_mu=0"
    if settings.nodes == "block_gains":
        if settings.graph == "knn":
            yield "filter.graph=knn compares entries of blocks, and block_gains knows only sizes"
        if settings.joint_loss_mu:
            yield "filter.joint_loss_mu compares entries of blocks; block_gains knows only sizes"
    if settings.anchor_steps and not settings.joint_loss_mu:
        yield f"filter.anchor_steps={settings.anchor_steps} has no effect without joint_loss_mu"
