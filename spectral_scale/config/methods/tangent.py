"""The tangent form of SST: factors beside fixed orthonormal bases, merged at every swap."""

from collections.abc import Iterator

from spectral_scale.config.methods.rules import (
    NO_MATRIX,
    TARGET_KEYS,
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
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import SpectralConfig

_KEY_BYTES = 16
"""State of a matrix's random bases: two 64-bit numbers."""


def basis_of(spectral: SpectralConfig) -> str:
    """The rule for bases, `auto` resolved."""
    return "random" if spectral.basis == "auto" else spectral.basis


def forms_weight(tokens: int, shape: tuple[int, int], itemsize: int) -> bool:
    """Whether products of an (m, n) layer with `tokens` inputs form the weight they stand for.

    Counts of multiply-adds, forward and backward: unmerged 2 mn + 5 r (m + n) a token, formed
    2 mn + 2 r (m + n) a token and 2 r mn for each of two weights, so that r cancels:

        formed if 3 tokens (m + n) > 4 mn        for m = n = 2048: above 1365 tokens

    A weight of 16 bits an element would round updates away that are below half its last place:
    such products stay unmerged.
    """
    m, n = shape
    return itemsize >= 4 and 3 * tokens * (m + n) > 4 * m * n


def _problems(spectral: SpectralConfig, architecture: Architecture) -> Iterator[str]:
    yield from rank_problems(spectral, architecture)
    if spectral.settings == "paper":
        yield (
            "spectral.settings=paper is SST as published, which has no spectral.form=tangent; "
            "leave one of them out"
        )
    if basis_of(spectral) == "random" and spectral.sampling != "mixed":
        yield (
            f"spectral.sampling={spectral.sampling} needs spectral.basis=svd: random bases take "
            "every direction once a round; leave it out"
        )


def _features(spectral: SpectralConfig) -> Iterator[str]:
    yield f"basis={basis_of(spectral)}"


def _kept_per_token(spectral: SpectralConfig, _: Architecture) -> int:
    """x v0, where the product is unmerged."""
    return spectral.spectral_rank


def _basis_bytes(spectral: SpectralConfig, model: PlannedModel, shape: tuple[int, int]) -> int:
    """State of the bases of one matrix: the key of random ones, or singular vectors."""
    if basis_of(spectral) == "random":
        return _KEY_BYTES
    return model.itemsize * spectral.spectral_rank * sum(shape)


def _memory(spectral: SpectralConfig, model: PlannedModel) -> MethodMemory:
    """Owners keep weights in full precision; one is copied to where it is changed if they lie in
    host memory, and decomposed there for `basis: svd`."""

    def owned(shape: tuple[int, int]) -> int:
        weight = model.itemsize * shape[0] * shape[1]
        return weight + _basis_bytes(spectral, model, shape)

    def workspace(shape: tuple[int, int]) -> int:
        if basis_of(spectral) == "svd":
            return decomposition_bytes(model.itemsize, shape)
        return model.itemsize * shape[0] * shape[1] if spectral.bank_device == "cpu" else 0

    def formed(shape: tuple[int, int]) -> int:
        size = model.product_itemsize
        return size * shape[0] * shape[1] if forms_weight(model.tokens, shape, size) else 0

    shapes = model.matrices.values()
    return MethodMemory(
        gathered=max(map(formed, model.shard_shapes()), default=0),
        owned=model.largest_load(owned),
        workspace=max(map(workspace, shapes), default=0),
        saved=sum(map(owned, shapes)),
    )


def _traffic(spectral: SpectralConfig, model: PlannedModel) -> MethodTraffic:
    """At a swap owners send weights and bases, which are all that is frozen; factors become zero
    where they are. Under tensor parallelism one sum of (tokens, r) a matrix completes gradients."""
    r, bottlenecks = spectral.spectral_rank, len(model.matrices) * model.tokens
    return MethodTraffic(
        swap=ring_bytes(model.frozen_bytes, model.world_size),
        completed=model.product_itemsize * bottlenecks * r,
    )


def _work(spectral: SpectralConfig, model: PlannedModel) -> MethodWork:
    """A swap merges two thin products into each weight; singular vectors are computed anew. Where
    products form the weight, that takes 4 r m n FLOPs for each of two weights."""
    r, size = spectral.spectral_rank, model.product_itemsize

    def formed(shape: tuple[int, int]) -> int:
        return 8 * r * shape[0] * shape[1] if forms_weight(model.tokens, shape, size) else 0

    return MethodWork(
        micro_batch_flops=model.tensor_parallel * sum(map(formed, model.shard_shapes())),
        swap_flops=model.largest_load(lambda shape: 4 * r * shape[0] * shape[1]),
        decomposed=model.decomposed_by_one() if basis_of(spectral) == "svd" else 0,
    )


TANGENT = MethodSpec(
    name="tangent",
    chosen_by="form=tangent",
    title="SST, tangent form",
    converts=True,
    keys=TARGET_KEYS
    | {
        "spectral.form",
        "spectral.basis",
        "spectral.spectral_rank",
        "spectral.steps_per_iteration",
        "spectral.iteration_warmup_steps",
        "spectral.sampling",
        "spectral.bank_device",
        "optimizer.spectral_lr",
    },
    problems=_problems,
    features=_features,
    filter_refusals={
        "layers": "factors of two layers lie in bases of their own; use block_gains",
        "rows": NO_MATRIX,
        "heads": NO_MATRIX,
    },
    muon=True,
    layout_keys=("form", "spectral_rank"),
    swaps=True,
    decomposes=True,
    kept_per_token=_kept_per_token,
    memory=_memory,
    traffic=_traffic,
    work=_work,
    headline_settings=("form", "basis", "spectral_rank"),
)
