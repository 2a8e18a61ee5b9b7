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
    """Parameters, whole or sharded, in the dtype that the backend keeps them in."""
    gradients: int
    """Gradients of trained parameters, whole or sharded."""
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
    """Bytes besides the weights that are held only while the model gets its memory."""
    host: int = 0
    """Bytes of the parts that are kept in the host's memory instead of the device's."""
    notes: tuple[str, ...] = field(default=())
    """Assumptions behind the figures."""


def memory_of(run: ResolvedRun, inventory: Inventory) -> Memory:
    """The parts for the run's backend; activations apart (see `plan.activations`)."""
    config, world_size = run.config, run.world_size
    # The backends' formulas see a tensor-parallel rank's part; methods and the filter get the
    # logical matrices and divide what they need themselves.
    here = rank_shard(config, inventory)
    parts = _PARTS[config.parallel.backend](run, here)
    method = method_memory(config, inventory, world_size)
    filtered = filter_needs(config, inventory, world_size=world_size)
    offloaded = config.parallel.offload == "cpu"
    parts["host" if offloaded else "optimizer"] += method.optimizer + filtered.kept
    sharded = config.parallel.backend == "fsdp2"
    group = shard_group_size(config.parallel, world_size) if sharded else 1
    parts["optimizer"] -= here.lighter_bytes(config) // group
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
    """Every rank holds all: 1,000 trained fp32 elements are 4,000 bytes of weights, as many of
    gradients, and 8,000 of Adam's two moments."""
    trained = inventory.nbytes(trainable=True)
    return {
        "weights": trained + inventory.nbytes(trainable=False),
        "gradients": trained,
        "optimizer": 2 * trained,
        "gathered": 0,
    }


def _fsdp2(run: ResolvedRun, inventory: Inventory) -> dict[str, int]:
    """Weights, gradients and moments are sharded over the group; what a pass gathers comes on top.

    10 blocks of 100 trained fp32 elements and 50 elements outside of them, on 4 ranks, nothing
    frozen: 4,200 bytes of weights are 1,050 a rank, gradients 1,050, moments 2,100. Gathered are
    two blocks, the one that computes and the next one, and what lies outside the blocks (800 + 200
    bytes), and the whole gradients of two blocks (800), or of the whole model (4,200) if
    micro-batches are accumulated, since they are reduced after the last one.
    """
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
    """Stage 1 shards masters and moments, stage 2 gradients as well, stage 3 weights as well.

    1,000 trained elements, none frozen, in bf16 on 4 ranks:

        stage   weights   gradients   masters and moments   fp32 gradients in the step
        0         2,000       2,000                12,000                            -
        1         2,000       2,000                 3,000                        1,000
        2         2,000         500                 3,000                        1,000
        3           500         500                 3,000                        1,000

    Masters take 4 bytes an element and Adam's two moments 8. In fp32, stage 0 needs no masters:
    the weights are the masters.
    """
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
    """Only the moments are sharded, and only by the distributed optimizer: over the ranks that see
    different data."""
    parts = _torch(run, inventory)
    ranks = run.data_parallel_size if run.config.parallel.distributed_optimizer else 1
    return parts | {"optimizer": _share(parts["optimizer"], ranks)}


_PARTS = {"torch": _torch, "fsdp2": _fsdp2, "deepspeed": _deepspeed, "megatron": _megatron}
_NOTES = {
    "fsdp2": ("FSDP2: two blocks and the root are whole at a time",),
    "deepspeed": ("DeepSpeed: its own workspaces beyond buckets and gathered blocks left out",),
}


def _share(nbytes: int, ranks: int) -> int:
    """Bytes of the fullest rank: of 10 bytes on 4 ranks, 3."""
    return -(-nbytes // ranks)
