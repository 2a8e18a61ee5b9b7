"""Bytes of a rank's device memory by part, on every backend: formulas, not measurements."""

from dataclasses import dataclass, field

from spectral_scale.config.capability import (
    shard_group_size,
    shards_residual,
    zero_stage,
)
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.plan.filter_needs import filter_needs
from spectral_scale.plan.inventory import Inventory
from spectral_scale.plan.method_needs import method_memory
from spectral_scale.plan.tensor_parallel_traffic import rank_shard

SVD_ASSUMPTION = (
    "SVD workspace: the largest matrix an owner decomposes, its factors, and 4 k^2 + m n "
    "elements of the driver, fp32"
)


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
    """Workspace of the largest re-decomposition, which never coincides with activations."""
    filter_workspace: int
    """Workspace of the filter besides gradients, which never coincides with activations."""
    starting: int = 0
    """Besides weights, only while the model gets its memory."""
    host: int = 0
    """In the host's memory instead."""
    notes: tuple[str, ...] = field(default=())
    """Assumptions behind the figures."""


def memory_of(run: ResolvedRun, inventory: Inventory) -> Memory:
    """The parts for the run's backend; activations apart (see `plan.activations`)."""
    config, world_size = run.config, run.world_size
    here = rank_shard(config, inventory)
    parts = _PARTS[config.parallel.backend](run, here)
    method = method_memory(config, inventory, world_size)
    filtered = filter_needs(config, inventory, world_size=world_size)
    offloaded = config.parallel.offload == "cpu"
    parts["host" if offloaded else "optimizer"] += method.optimizer + filtered.kept
    parts["gathered"] += method.gathered
    bank = method.owned
    host = parts.pop("host", 0)
    if config.spectral.bank_device == "cpu":
        host, bank = host + bank, 0
    return Memory(
        **parts,
        bank=bank,
        host=host,
        svd_workspace=method.workspace,
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
    starting = 0
    if stage == 3:  # each parameter is whole before it is sharded
        starting = size * max((item.numel for item in inventory.items), default=0)
    elif stage <= 1 and half:  # BF16_Optimizer copies the weights into flat buffers
        starting = size * trained
    settings = {} if run.deepspeed is None else run.deepspeed.initialize
    buckets = settings.get("zero_optimization", {})
    elements = min(int(buckets.get("reduce_bucket_size", 5e8)), trained) if stage else 0
    parts = {
        "weights": weights,
        "gradients": gradients,
        "gathered": gathered + size * elements,
        "starting": starting,
    }
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
