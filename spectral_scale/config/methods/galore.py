"""GaLore: the gradients of the blocks' matrices are projected to rank r before AdamW."""

from spectral_scale.config.methods.rules import rank_problems
from spectral_scale.config.methods.spec import (
    MethodMemory,
    MethodSpec,
    MethodTraffic,
    MethodWork,
    PlannedModel,
)
from spectral_scale.config.schema import SpectralConfig

_NOT_SHOWN = "no test has shown it; use spectral.method=full"
_HELD = 5
"""Matrices that an owner holds at most while one is under way: the gradient, what is sent and
received of it, its update."""


def _memory(spectral: SpectralConfig, model: PlannedModel) -> MethodMemory:
    """Moments of rank r and projectors in the place of the matrices' dense moments."""
    itemsize, r = model.itemsize, spectral.spectral_rank
    loads = [0] * model.block_ranks
    for shape, owner in zip(model.block_matrices, model.block_owners, strict=True):
        loads[owner] += 2 * r * max(shape) + r * min(shape)
    sizes = [m * n for m, n in model.block_matrices]
    dense = -(-2 * itemsize * sum(sizes) // model.block_ranks)
    return MethodMemory(
        optimizer=itemsize * max(loads) - dense,
        gathered=_HELD * itemsize * max(sizes) if model.block_ranks > 1 else 0,
    )


def _traffic(spectral: SpectralConfig, model: PlannedModel) -> MethodTraffic:
    """Gradients go to owners and updates back; replicas of the model take over from each other the
    projectors that one of them renewed."""
    owners, itemsize = model.block_ranks, model.itemsize
    sizes = [itemsize * m * n for m, n in model.block_matrices]
    if model.flat_buffers:
        step: float = 2 * max(sizes) if owners > 1 else 0
    else:
        step = 2 * sum(sizes) * (owners - 1) / owners**2
    projectors = sum(spectral.spectral_rank * min(s) * itemsize for s in model.block_matrices)
    return MethodTraffic(step=step, swap=projectors * (1 - owners / model.world_size))


def _work(spectral: SpectralConfig, model: PlannedModel) -> MethodWork:
    """Every step projects each gradient to rank r and its update back, 4 r m n FLOPs on the owner,
    and every renewal decomposes each gradient."""
    projected, decomposed = [0] * model.block_ranks, [0] * model.block_ranks
    for (m, n), owner in zip(model.block_matrices, model.block_owners, strict=True):
        projected[owner] += 4 * spectral.spectral_rank * m * n
        decomposed[owner] += max(m, n) * min(m, n) ** 2
    return MethodWork(step_flops=max(projected), decomposed=max(decomposed))


GALORE = MethodSpec(
    name="galore",
    title="GaLore",
    decomposes=True,
    keys=frozenset(
        {
            "spectral.spectral_rank",
            "spectral.steps_per_iteration",
            "optimizer.spectral_lr",
            "optimizer.galore_scale",
        }
    ),
    problems=rank_problems,
    filter_refusals=dict.fromkeys(("layers", "rows", "heads", "block_gains"), _NOT_SHOWN),
    tensor_parallel=False,
    own_optimizer=True,
    layout_keys=("spectral_rank",),
    swaps=True,
    memory=_memory,
    traffic=_traffic,
    work=_work,
)
