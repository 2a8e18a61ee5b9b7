"""Bytes that collectives carry per step and per swap, by formula, for each rank of a ring."""

from dataclasses import dataclass, replace

from spectral_scale.config.capability import (
    data_parallel_size,
    shard_group_size,
    shards_residual,
    zero_stage,
)
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.plan.filter_needs import filter_needs
from spectral_scale.plan.inventory import Inventory
from spectral_scale.plan.method_needs import method_traffic
from spectral_scale.plan.payload import Payload
from spectral_scale.plan.tensor_parallel_traffic import rank_shard, tensor_parallel_payload


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that each rank's links carry."""

    step: int
    """Gradients, gathered weights and what the spectral filter exchanges in an optimizer step."""
    swap: int
    """New factors and frozen weights at a swap, merge or refresh, on top of the step's."""


def traffic_of(run: ResolvedRun, inventory: Inventory) -> Traffic:
    """The bytes for the run's backend; nothing for one process."""
    config, world_size = run.config, run.world_size
    group, replicas = groups(config, world_size)
    payload = step_payload(run, rank_shard(config, inventory))
    sharded, summed = replace(payload, all_reduce=0), Payload(all_reduce=payload.all_reduce)
    moved = sharded.ring_bytes(group) + summed.ring_bytes(replicas)
    within = tensor_parallel_payload(run, inventory)
    moved += within.ring_bytes(config.parallel.tensor_parallel)
    filtered = filter_needs(config, inventory, world_size=world_size)
    moved += filtered.exchanged + filtered.reduced
    moved += grams(config, inventory).ring_bytes(group)
    method = method_traffic(config, inventory, world_size)
    return Traffic(step=round(moved + method.step), swap=round(method.swap))


def grams(config: RunConfig, inventory: Inventory) -> Payload:
    """The r x r matrices that Muon sums over the shards of factors (m, r); none where factors are
    whole on every rank."""
    if config.parallel.backend != "fsdp2":
        return Payload()
    items = inventory.muon_items(config)
    return Payload(all_reduce=sum(item.itemsize * min(item.shape) ** 2 for item in items))


def groups(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Ranks of a shard group, and the number of replicas whose gradients are summed.

    8 ranks under FSDP2 with shard_group 4 are 4 ranks that share one replica, and 2 replicas. On
    the other backends all ranks of different data take part in both kinds of message: 8 and 8, or
    4 and 4 with tensor_parallel 2.
    """
    ranks = data_parallel_size(config.parallel, world_size)
    if config.parallel.backend != "fsdp2":
        return ranks, ranks
    group = shard_group_size(config.parallel, world_size) // config.parallel.tensor_parallel
    return group, ranks // group


def step_payload(run: ResolvedRun, inventory: Inventory) -> Payload:
    """What one optimizer step sends between ranks of different data: all-reduces over all of them,
    or over the replicas of a shard. The inventory is one tensor-parallel rank's."""
    config, accumulation = run.config, run.gradient_accumulation_steps
    trained = inventory.nbytes(trainable=True)
    if config.parallel.backend == "fsdp2":
        return _fsdp2(config, inventory, run.world_size, accumulation)
    if config.parallel.backend != "deepspeed":
        return Payload(all_reduce=trained)
    size = 2 if config.train.precision in ("bf16", "fp16") else 4
    stage, weights = zero_stage(config.parallel), size * inventory.numel(trainable=True)
    if stage == 0:
        return Payload(all_reduce=weights)
    if stage < 3:
        return Payload(all_gather=weights, reduce_scatter=weights)
    frozen = size * inventory.numel(trainable=False) if shards_residual(config.parallel) else 0
    # Every micro-batch gathers the weights twice, for its forward and for its backward pass.
    return Payload(all_gather=2 * accumulation * (weights + frozen), reduce_scatter=weights)


def _fsdp2(config: RunConfig, inventory: Inventory, world_size: int, accumulation: int) -> Payload:
    """Blocks are gathered for each forward and each backward pass, the root once for both."""
    trained = inventory.nbytes(trainable=True)
    root = inventory.nbytes(trainable=True, in_blocks=False)
    frozen = inventory.nbytes(trainable=False) if shards_residual(config.parallel) else 0
    group, replicas = groups(config, world_size)
    return Payload(
        all_gather=accumulation * (2 * (trained - root + frozen) + root),
        reduce_scatter=trained,
        all_reduce=0 if replicas == 1 else trained // group,
    )
