"""The time of a step's messages: bytes and hops over the links of a group of ranks. No torch."""

from dataclasses import dataclass
from math import ceil, log2

from spectral_scale.config.capability import zero_stage
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.plan.filter_needs import filter_needs
from spectral_scale.plan.gpus import LINK_SECONDS, LINK_SHARE, NETWORK_SECONDS, Cluster
from spectral_scale.plan.inventory import Inventory
from spectral_scale.plan.method_needs import method_traffic
from spectral_scale.plan.payload import Payload
from spectral_scale.plan.tensor_parallel_traffic import rank_shard, tensor_parallel_payload
from spectral_scale.plan.traffic import grams, groups, step_payload

BUCKET_BYTES = 25e6
"""Bytes of gradients that DDP and Megatron send as one message."""
BACKWARD = 2 / 3
"""Share of a micro-batch's time that is its backward pass."""
HIDDEN = 0.8
"""Share of the computation's time in which messages travel unnoticed, where a backend overlaps
them."""


@dataclass(frozen=True, kw_only=True)
class GroupLinks:
    """What connects the ranks of a group, the slowest part of a ring through them."""

    rate: float
    """Bytes a second of a rank's link."""
    ring_seconds: float
    """Delay of all hops of a ring."""
    tree_seconds: float
    """Delay of all levels of a tree, up and down."""

    @classmethod
    def of(cls, cluster: Cluster, ranks: int, *, stride: int = 1) -> "GroupLinks":
        """The links of `ranks` ranks of which each is `stride` behind the one before.

        The members of a group that lie on one node share that node's network: 8 GPUs of 25 GB/s
        each pass a ring on at 200 GB/s, and 8 rings of one GPU a node at 25 GB/s each.
        """
        here = min(ranks, max(1, cluster.gpus_per_node // stride))
        nodes = ceil(ranks / here)
        rate = cluster.gpu.link_rate
        if nodes > 1:
            between = here * cluster.network_rate
            rate = min(rate, between) if here > 1 else between
        hops = (ranks - nodes) * LINK_SECONDS + (nodes - 1) * NETWORK_SECONDS
        levels = ceil(log2(max(here, 1))) * LINK_SECONDS + ceil(log2(nodes)) * NETWORK_SECONDS
        return cls(rate=LINK_SHARE * rate, ring_seconds=hops, tree_seconds=2 * levels)

    def seconds(self, payload: Payload, ranks: int, *, messages: float = 1) -> float:
        """Time of a payload that travels as `messages` collectives; none within one rank."""
        if ranks == 1:
            return 0.0
        delay = self.ring_seconds if payload.all_gather + payload.reduce_scatter else 0.0
        if payload.all_reduce:
            delay = max(delay, self.tree_seconds)
        return payload.ring_bytes(ranks) / self.rate + messages * delay


@dataclass(frozen=True, kw_only=True)
class MessageSeconds:
    """Time of the messages of an optimizer step, and of a swap."""

    overlapped: float
    """Messages that travel while the rank computes, as far as there is time."""
    exposed: float
    """Messages for which the rank waits."""
    swap: float
    """Messages of a swap, merge or renewal."""


def message_seconds(run: ResolvedRun, inventory: Inventory, cluster: Cluster) -> MessageSeconds:
    """Time of all messages of a run's step by its backend, filter and method."""
    config, world_size = run.config, run.world_size
    parallel = config.parallel
    group, replicas = groups(config, world_size)
    payload = step_payload(run, rank_shard(config, inventory))
    sharded = Payload(all_gather=payload.all_gather, reduce_scatter=payload.reduce_scatter)
    sharded += grams(config, inventory)
    parts = parallel.tensor_parallel
    stride = parts * group if parallel.backend == "fsdp2" else parts
    messages = _messages(run, payload)
    between = GroupLinks.of(cluster, group, stride=parts).seconds(sharded, group, messages=messages)
    between += GroupLinks.of(cluster, replicas, stride=stride).seconds(
        Payload(all_reduce=payload.all_reduce), replicas, messages=messages
    )
    whole = GroupLinks.of(cluster, world_size)
    method = method_traffic(config, inventory, world_size)
    filtered = filter_needs(config, inventory, world_size=world_size)
    rest = method.step + filtered.exchanged + filtered.reduced
    exposed = _within(run, inventory, cluster) + rest / whole.rate
    swap = method.swap / whole.rate + (whole.ring_seconds if method.swap else 0.0)
    if overlaps(run):
        return MessageSeconds(overlapped=between, exposed=exposed, swap=swap)
    return MessageSeconds(overlapped=0.0, exposed=exposed + between, swap=swap)


def overlaps(run: ResolvedRun) -> bool:
    """Whether the backend sends while the rank computes."""
    parallel = run.config.parallel
    return parallel.backend != "deepspeed" or zero_stage(parallel) == 3


def hidden_seconds(run: ResolvedRun, micro_batch_seconds: float) -> float:
    """Time in which overlapped messages of a step cost nothing: all passes where weights are
    gathered for each, and otherwise the last backward pass."""
    if run.config.parallel.backend in ("fsdp2", "deepspeed"):
        return HIDDEN * run.gradient_accumulation_steps * micro_batch_seconds
    return HIDDEN * BACKWARD * micro_batch_seconds


def _within(run: ResolvedRun, inventory: Inventory, cluster: Cluster) -> float:
    """Time of what tensor-parallel ranks send each other, for which all of them wait."""
    parts = run.config.parallel.tensor_parallel
    if parts == 1:
        return 0.0
    payload = tensor_parallel_payload(run, inventory)
    blocks, passes = run.architecture.num_layers, run.gradient_accumulation_steps
    messages = 4 * blocks * passes
    return GroupLinks.of(cluster, parts).seconds(payload, parts, messages=messages)


def _messages(run: ResolvedRun, payload: Payload) -> float:
    """Collectives of a step between ranks of different data."""
    parallel, blocks = run.config.parallel, run.architecture.num_layers
    if parallel.backend == "fsdp2" or (
        parallel.backend == "deepspeed" and zero_stage(parallel) == 3
    ):
        return run.gradient_accumulation_steps * 2 * (blocks + 1) + blocks + 1
    moved = payload.all_gather + payload.reduce_scatter + payload.all_reduce
    return max(1, ceil(moved / BUCKET_BYTES))
