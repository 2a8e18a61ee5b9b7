"""Bytes of a rank's device memory by part, on every backend: formulas, not measurements."""

from dataclasses import dataclass, field

from spectral_scale.config.capability import (
    projection_group,
    shard_group_size,
    shards_residual,
    zero_stage,
)
from spectral_scale.config.presets import Architecture
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.methods.owners import assign_owners
from spectral_scale.plan.activations import master_itemsize
from spectral_scale.plan.filter_needs import filter_needs
from spectral_scale.plan.inventory import Inventory, dense_matrices
from spectral_scale.plan.tensor_parallel_traffic import rank_shard

SVD_ASSUMPTION = (
    "SVD workspace: the largest matrix an owner decomposes, its factors, and 4 k^2 + m n "
    "elements of the driver, fp32"
)

FORMED = 3
"""m x n matrices in V's precision that a FRoD layer holds at most in a pass."""
GRAM_WORKSPACE = 10
"""n x n matrices in float64 that FRoD's decomposition holds at most, beside one weight."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: int
    """Parameters in the dtype they are trained and multiplied in."""
    gradients: int
    """Whole or sharded, of trained parameters."""
    optimizer: int
    """Moments, and fp32 masters where the backend keeps some apart."""
    bank: int
    """Triplets or base weights that this rank owns."""
    gathered: int
    """Blocks that are gathered for a pass, whole gradients and communication buffers."""
    svd_workspace: int
    """Of the largest re-decomposition; not at the same time as a step's activations."""
    filter_workspace: int
    """Of the spectral filter, beside gradients; not at the same time as activations."""
    host: int = 0
    """In the host's memory instead."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed."""


def memory_of(run: ResolvedRun, inventory: Inventory) -> Memory:
    """The parts for the run's backend; activations apart (see `plan.activations`)."""
    config, architecture, world_size = run.config, run.architecture, run.world_size
    here = rank_shard(config, inventory)
    parts = _PARTS[config.parallel.backend](run, here)
    if config.spectral.method == "galore":
        resting = "host" if config.parallel.offload == "cpu" else "optimizer"
        parts[resting] += _galore(config, architecture, inventory, world_size)
        if projection_group(config.parallel, world_size) > 1:
            parts["gathered"] += _galore_round(architecture, inventory)
    bank = owned_bytes(config, inventory, world_size)
    if config.spectral.method == "frod":
        parts["gathered"] += formed_weight_bytes(config, inventory)
    filtered = filter_needs(config, inventory, world_size=world_size)
    parts["host" if config.parallel.offload == "cpu" else "optimizer"] += filtered.kept
    host = parts.pop("host", 0)
    if config.spectral.bank_device == "cpu":
        host, bank = host + bank, 0
    return Memory(
        **parts,
        bank=bank,
        host=host,
        svd_workspace=svd_bytes(config, inventory, world_size),
        filter_workspace=filtered.workspace,
        notes=(SVD_ASSUMPTION, *_NOTES.get(config.parallel.backend, ())),
    )


def _torch(run: ResolvedRun, inventory: Inventory) -> dict[str, int]:
    trained = inventory.nbytes(trainable=True)
    return {
        "weights": trained + inventory.nbytes(trainable=False),
        "gradients": trained,
        "optimizer": 2 * trained,
        "gathered": 0,
    }


def _fsdp2(run: ResolvedRun, inventory: Inventory) -> dict[str, int]:
    parallel = run.config.parallel
    group = shard_group_size(parallel, run.world_size) // parallel.tensor_parallel
    sharded = shards_residual(parallel)
    trained = inventory.nbytes(trainable=True)
    frozen = inventory.nbytes(trainable=False)
    itemsize = trained // max(inventory.numel(trainable=True), 1)
    block = inventory.largest_block(trainable=True) * itemsize
    gathered = 2 * block + inventory.nbytes(trainable=True, in_blocks=False)
    if sharded:
        gathered += 2 * inventory.largest_block(trainable=False) * inventory.frozen_itemsize()
    gathered += trained if run.gradient_accumulation_steps > 1 else 2 * block
    return {
        "weights": _share(trained, group) + (_share(frozen, group) if sharded else frozen),
        "gradients": _share(trained, group),
        "optimizer": _share(2 * trained, group),
        "gathered": 0 if group == 1 else gathered,
    }


def _deepspeed(run: ResolvedRun, inventory: Inventory) -> dict[str, int]:
    config = run.config
    stage = zero_stage(config.parallel)
    half = config.train.precision in ("bf16", "fp16")
    size = 2 if half else 4
    trained, frozen = inventory.numel(trainable=True), inventory.numel(trainable=False)
    share = run.world_size if stage else 1
    weights, gradients = size * (trained + frozen), size * trained
    gathered = 0
    if stage == 3:
        sharded = shards_residual(config.parallel)
        weights = _share(size * trained, share) + size * (
            _share(frozen, share) if sharded else frozen
        )
        whole = inventory.largest_block(trainable=True) + inventory.largest_block(trainable=False)
        gathered = size * (2 * whole + inventory.numel(trainable=True, in_blocks=False))
    if stage >= 2:
        gradients = _share(gradients, share)
    masters = 4 * trained if half or stage else 0
    optimizer = _share(masters + 8 * trained, share)
    if stage and half:
        optimizer += _share(4 * trained, share)  # fp32 gradients of the rank's part, in the step
    settings = {} if run.deepspeed is None else run.deepspeed.initialize
    buckets = settings.get("zero_optimization", {})
    elements = min(int(buckets.get("reduce_bucket_size", 5e8)), trained) if stage else 0
    parts = {"weights": weights, "gradients": gradients, "gathered": gathered + size * elements}
    if config.parallel.offload == "cpu":
        return parts | {"optimizer": 0, "host": optimizer}
    return parts | {"optimizer": optimizer}


def _megatron(run: ResolvedRun, inventory: Inventory) -> dict[str, int]:
    parts = _torch(run, inventory)
    ranks = run.data_parallel_size if run.config.parallel.distributed_optimizer else 1
    return parts | {"optimizer": _share(parts["optimizer"], ranks)}


_PARTS = {"torch": _torch, "fsdp2": _fsdp2, "deepspeed": _deepspeed, "megatron": _megatron}
_NOTES = {
    "fsdp2": ("FSDP2: two blocks and the root are whole at a time",),
    "deepspeed": ("DeepSpeed: its own workspaces beyond buckets and gathered blocks left out",),
}


def _share(nbytes: int, ranks: int) -> int:
    return -(-nbytes // ranks)


def _galore(
    config: RunConfig, architecture: Architecture, inventory: Inventory, world_size: int
) -> int:
    """What moments in rank r and projectors, on the fullest rank, add to dense moments' bytes."""
    itemsize, r = inventory.items[0].itemsize, config.spectral.spectral_rank
    group = projection_group(config.parallel, world_size)
    matrices = {str(i): shape for i, shape in enumerate(dense_matrices(architecture))}
    loads = [0] * group
    for name, rank in assign_owners(matrices, group).items():
        loads[rank] += 2 * r * max(matrices[name]) + r * min(matrices[name])
    dense = _share(2 * itemsize * sum(m * n for m, n in matrices.values()), group)
    return itemsize * max(loads) - dense


def _galore_round(architecture: Architecture, inventory: Inventory) -> int:
    """What an owner holds at most while a matrix is under way: the gradient, what is sent and
    received of it, its update."""
    return 5 * inventory.items[0].itemsize * max(m * n for m, n in dense_matrices(architecture))


def shared_basis_bytes(config: RunConfig, inventory: Inventory) -> int:
    """FRoD's V, V^-T and positions, once a category, and 1 / lambda of every layer."""
    from spectral_scale.config.methods.frod import category_of, entries

    itemsize = master_itemsize(config)
    widths = {category_of(name): n for name, (_, n) in inventory.matrices.items()}
    positions = (16 * entries(n, config.spectral.sparsity) for n in widths.values())
    bases = sum(itemsize * 2 * n * n for n in widths.values()) + sum(positions)
    return bases + sum(itemsize * n for _, n in inventory.matrices.values())


def formed_weight_bytes(config: RunConfig, inventory: Inventory) -> int:
    """What FRoD's largest layer forms in a pass and frees after it: in the backward pass U and the
    inner product, then U, the gradient of the weight and that in V's basis, besides the weight."""
    itemsize = master_itemsize(config)
    held = FORMED + (inventory.frozen_itemsize() < itemsize)  # and W in V's precision
    return max(held * itemsize * m * n for m, n in inventory.matrices.values())


def owned_bytes(config: RunConfig, inventory: Inventory, world_size: int) -> int:
    """Bytes on the rank that owns most: all triplets (sst), or base weights (relora) where the
    layers' own are rounded; FRoD's bases, which every rank has."""
    if config.spectral.method == "frod":
        return shared_basis_bytes(config, inventory)
    itemsize = master_itemsize(config)
    loads = [0] * world_size
    for name, rank in assign_owners(inventory.matrices, world_size).items():
        m, n = inventory.matrices[name]
        loads[rank] += {
            "sst": itemsize * min(m, n) * (m + n + 1),
            "relora": itemsize * m * n if inventory.frozen_itemsize() < itemsize else 0,
        }.get(config.spectral.method, 0)
    return max(loads)


def svd_bytes(config: RunConfig, inventory: Inventory, world_size: int) -> int:
    """Workspace of the largest SVD; 0 for methods that decompose nothing on a schedule."""
    if config.spectral.method not in ("sst", "galore", "frod") or not inventory.matrices:
        return 0
    if config.spectral.method == "frod":
        return max(8 * (GRAM_WORKSPACE * n * n + m * n) for m, n in inventory.matrices.values())
    itemsize = master_itemsize(config)

    def workspace(m: int, n: int) -> int:
        k = min(m, n)
        return itemsize * (2 * m * n + k * (m + n + 1) + 4 * k * k)

    return max(workspace(m, n) for m, n in inventory.matrices.values())
