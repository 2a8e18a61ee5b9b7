"""FRoD: fine-tuning in a basis that all layers of a kind share (Wan et al., arXiv 2512.23485)."""

import math
from collections.abc import Iterator

from spectral_scale.config.methods.rules import NO_MATRIX, TARGET_KEYS, converted_shapes
from spectral_scale.config.methods.spec import (
    MethodMemory,
    MethodSpec,
    MethodTraffic,
    MethodWork,
    PlannedModel,
)
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig, SpectralConfig

FORMED = 3
"""m x n matrices in V's precision that a layer holds at most in a pass: in the backward pass U and
the inner product, then U, the gradient of the weight and that in V's basis, besides the weight."""
GRAM_WORKSPACE = 10
"""n x n matrices in float64 that the decomposition holds at most, beside one weight."""


def category_of(fqn: str) -> str:
    """The category of a layer: layers of one role in different blocks share one.

    It is the whole name inside the block, which tells `attention.output.dense` from `output.dense`
    in BERT and RoBERTa: what follows the last number, numbers at the end left out. `fc1` is that
    of `decoder.layers.3.fc1`, `self_attn.q_proj` that of `layers.0.self_attn.q_proj`.
    """
    parts = fqn.split(".")
    while parts and parts[-1].isdigit():
        parts.pop()
    last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last_number + 1 :]) or "linear"


def entries(width: int, sparsity: float) -> int:
    """floor(sparsity n^2) entries of S, never more than there are off the diagonal."""
    return min(math.floor(sparsity * width * width), width * (width - 1))


def _problems(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    for name, (_, width) in converted_shapes(spectral, architecture).items():
        if math.floor(spectral.sparsity * width * width) < 1:
            yield (
                f"spectral.sparsity={spectral.sparsity:g} selects none of the {width} x {width} "
                f"entries of S of {name}; set it to at least {1 / (width * width):.3g}"
            )
    if architecture.num_layers < 2:
        yield (
            "spectral.method=frod shares a basis between the layers of a kind, and the model has "
            "one block; use lora or sst, or a model with at least 2 blocks"
        )


def _run_problems(config: RunConfig) -> Iterator[str]:
    if config.model.compile:
        yield (
            "model.compile=true was not tried with spectral.method=frod, whose products are sparse "
            "on the CPU; set model.compile=false"
        )


def _shared_basis_bytes(spectral: SpectralConfig, model: PlannedModel) -> int:
    """V, V^-T and the positions of S, once a category, and 1 / lambda of every layer."""
    itemsize = model.itemsize
    widths = {category_of(name): n for name, (_, n) in model.matrices.items()}
    positions = (16 * entries(n, spectral.sparsity) for n in widths.values())
    bases = sum(itemsize * 2 * n * n for n in widths.values()) + sum(positions)
    return bases + sum(itemsize * n for _, n in model.matrices.values())


def _memory(spectral: SpectralConfig, model: PlannedModel) -> MethodMemory:
    """Every rank has all bases; the largest layer's weight is formed in a pass and freed after."""
    bases, shapes = _shared_basis_bytes(spectral, model), model.matrices.values()
    held = FORMED + (model.frozen_itemsize < model.itemsize)  # and W in V's precision
    gram = (8 * (GRAM_WORKSPACE * n * n + m * n) for m, n in shapes)
    return MethodMemory(
        gathered=max(held * model.itemsize * m * n for m, n in shapes),
        owned=bases,
        workspace=max(gram, default=0),
        saved=bases,
    )


def _traffic(spectral: SpectralConfig, model: PlannedModel) -> MethodTraffic:
    """FRoD adds nothing but sums of gradients under tensor parallelism: of S and lambda of every
    matrix, and of U where inputs are sharded."""
    elements = 0
    for name, (m, n) in model.matrices.items():
        elements += entries(n, spectral.sparsity) + n
        elements += model.passes * m * n if name in model.row_parallel else 0
    return MethodTraffic(completed=model.itemsize * elements)


def _work(_: SpectralConfig, model: PlannedModel) -> MethodWork:
    """Forming the weights takes 16 m n^2 FLOPs a layer and micro-batch on GPUs, where products with
    S are dense (`methods.frod.product`)."""
    return MethodWork(micro_batch_flops=sum(16 * m * n * n for m, n in model.matrices.values()))


FROD = MethodSpec(
    name="frod",
    title="FRoD",
    decomposes=True,
    converts=True,
    keys=TARGET_KEYS
    | {"spectral.sparsity", "spectral.ridge", "optimizer.spectral_lr", "optimizer.value_lr"},
    problems=_problems,
    run_problems=_run_problems,
    filter_refusals={"rows": NO_MATRIX, "heads": NO_MATRIX},
    layout_keys=("sparsity",),
    keeps_initial_weights=True,
    has_adapter=True,
    memory=_memory,
    traffic=_traffic,
    work=_work,
    counted={"frod": {}},
    counted_by="sparsity",
)
