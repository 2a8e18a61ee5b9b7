"""Sparse Spectral Training: r singular triplets of every converted matrix train at a time."""

import math
from collections.abc import Iterator
from dataclasses import fields

from spectral_scale.config.methods.rules import (
    NO_MATRIX,
    decomposition_bytes,
    rank_problems,
    ring_bytes,
)
from spectral_scale.config.methods.spec import (
    MethodMemory,
    MethodSpec,
    MethodTraffic,
    MethodWork,
    PlannedModel,
)
from spectral_scale.config.presets import Architecture, linear_shapes
from spectral_scale.config.schema import RunConfig, SpectralConfig

_NOT_ITS_OWN = {"method", "settings", "lora_alpha", "sparsity", "ridge"}


def iterations_per_round(spectral: SpectralConfig, smaller_sides: list[int]) -> int:
    """T2: as configured, or ceil(k / r) for the largest k = min(m, n) of the converted matrices."""
    if spectral.iterations_per_round != "auto":
        return spectral.iterations_per_round
    return math.ceil(max(smaller_sides) / spectral.spectral_rank)


def trains_all_sigma(spectral: SpectralConfig) -> bool:
    """Whether every singular value trains, not only those of the active triplets."""
    if spectral.trained_sigma == "auto":
        return spectral.storage == "factored"
    return spectral.trained_sigma == "all"


def _problems(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    yield from rank_problems(spectral, architecture)
    if spectral.basis == "random":
        yield (
            "spectral.basis=random needs spectral.form=tangent: triplets are singular vectors; "
            "leave it out"
        )
    if spectral.iterations_per_round != "auto" and spectral.iterations_per_round < 1:
        yield f"spectral.iterations_per_round={spectral.iterations_per_round} must be at least 1"
    if spectral.trained_sigma == "all" and spectral.storage == "residual":
        yield (
            "spectral.trained_sigma=all needs spectral.storage=factored: in residual storage the "
            "inactive singular values are merged and have no gradient"
        )
    if spectral.residual_dtype != "auto" and spectral.storage != "residual":
        yield (
            f"spectral.residual_dtype={spectral.residual_dtype} needs spectral.storage=residual: "
            "factored storage has no residual; leave one of them out"
        )
    if spectral.extra_sigma and spectral.storage != "residual":
        yield (
            f"spectral.extra_sigma={spectral.extra_sigma} needs spectral.storage=residual: "
            "factored storage trains all singular values; leave it out"
        )
    smallest = min(min(shape) for shape in linear_shapes(architecture).values())
    if spectral.spectral_rank <= smallest < spectral.spectral_rank + spectral.extra_sigma:
        yield (
            f"spectral.spectral_rank={spectral.spectral_rank} + spectral.extra_sigma="
            f"{spectral.extra_sigma} exceed the {smallest} triplets of the smallest matrix; lower "
            "extra_sigma"
        )


def _run_problems(config: RunConfig) -> Iterator[str]:
    if config.spectral.residual_dtype == "int8" and config.model.compile:
        yield (
            "spectral.residual_dtype=int8 was not tried in compiled blocks; set model.compile=false"
        )


def _features(spectral: SpectralConfig) -> Iterator[str]:
    yield f"storage={spectral.storage}"
    if spectral.residual_dtype != "auto":
        yield f"residual_dtype={spectral.residual_dtype}"
    if spectral.extra_sigma:
        yield "extra_sigma"
    if spectral.boundary_moments != "reset":
        yield "moments=kept"


def _kept_per_token(spectral: SpectralConfig, architecture: Architecture) -> int:
    """x v: of the trained directions, and of all others whose sigma trains."""
    if trains_all_sigma(spectral):
        return min(architecture.hidden_size, architecture.ffn_size)
    return spectral.spectral_rank + spectral.extra_sigma


def _triplets(shape: tuple[int, int]) -> int:
    """Elements of all triplets of a matrix: k (m + n + 1)."""
    m, n = shape
    return min(m, n) * (m + n + 1)


def _memory(_: SpectralConfig, model: PlannedModel) -> MethodMemory:
    shapes, itemsize = model.matrices.values(), model.itemsize
    return MethodMemory(
        owned=model.largest_load(lambda shape: itemsize * _triplets(shape)),
        workspace=max((decomposition_bytes(itemsize, shape) for shape in shapes), default=0),
        saved=itemsize * sum(map(_triplets, shapes)),
    )


def _traffic(spectral: SpectralConfig, model: PlannedModel) -> MethodTraffic:
    """At a swap owners send the new factors and all frozen weights; under tensor parallelism one
    sum of (tokens, r) a matrix completes the gradients, and one of the sigma that are fixed."""
    r, shapes = spectral.spectral_rank, model.matrices.values()
    swapped = model.itemsize * sum(r * (m + n + 1) for m, n in shapes) + model.frozen_bytes
    fixed = 0
    if trains_all_sigma(spectral):
        fixed = sum(min(shape) - r for shape in shapes)
    elif spectral.extra_sigma:
        fixed = len(shapes) * spectral.extra_sigma
    bottlenecks = len(shapes) * model.tokens * r
    return MethodTraffic(
        swap=ring_bytes(swapped, model.world_size),
        completed=model.product_itemsize * bottlenecks + model.itemsize * fixed,
    )


def _work(spectral: SpectralConfig, model: PlannedModel) -> MethodWork:
    """At a swap an owner rebuilds frozen weights, 2 m n k FLOPs each (none in factored storage);
    once a round it decomposes its matrices again."""
    rebuilt = 0
    if spectral.storage == "residual":
        rebuilt = model.largest_load(lambda shape: 2 * shape[0] * shape[1] * min(shape))
    rounds = iterations_per_round(spectral, [min(shape) for shape in model.matrices.values()])
    return MethodWork(swap_flops=rebuilt, decomposed=model.decomposed_by_one() / rounds)


SST = MethodSpec(
    name="sst",
    title="SST",
    decomposes=True,
    converts=True,
    keys=frozenset(
        f"spectral.{key.name}" for key in fields(SpectralConfig) if key.name not in _NOT_ITS_OWN
    )
    | {"optimizer.spectral_lr", "optimizer.spectral_weight_decay"},
    problems=_problems,
    run_problems=_run_problems,
    features=_features,
    filter_refusals={"rows": NO_MATRIX, "heads": NO_MATRIX},
    layout_keys=("storage", "spectral_rank"),
    swaps=True,
    kept_per_token=_kept_per_token,
    memory=_memory,
    traffic=_traffic,
    work=_work,
    counted={
        "sst residual": {"storage": "residual"},
        "sst factored": {"storage": "factored"},
    },
    counted_by="spectral_rank",
)
