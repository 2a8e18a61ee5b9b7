"""The time of messages by the links of their group."""

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.plan.gpus import LINK_SECONDS, LINK_SHARE, NETWORK_SECONDS, Cluster, gpu_named
from spectral_scale.plan.inventory import take_inventory
from spectral_scale.plan.links import GroupLinks, message_seconds
from spectral_scale.plan.payload import Payload

NODE = Cluster(gpu=gpu_named("a100-80gb"), nodes=1, gpus_per_node=8)
FOUR = Cluster(gpu=gpu_named("a100-80gb"), nodes=4, gpus_per_node=8)


def run_of(cluster: Cluster, *words: str) -> ResolvedRun:
    fixed = ["--train.precision=bf16", "--train.global_batch_size=64", "--train.micro_batch_size=1"]
    config = load_config([], [*fixed, *words]).config
    return resolve(config, world_size=cluster.world_size)


@pytest.mark.parametrize(
    ("cluster", "ranks", "stride", "rate"),
    [
        (NODE, 8, 1, 300e9),  # NVLink
        (FOUR, 8, 1, 300e9),  # one node's ranks
        (FOUR, 32, 1, 200e9),  # 8 networks of 25 GB/s
        (FOUR, 4, 8, 25e9),  # replicas of one shard: one network each
        (FOUR, 16, 2, 100e9),  # every second rank: 4 networks
        (FOUR, 4, 1, 300e9),
    ],
)
def test_the_slowest_link_of_a_group(
    cluster: Cluster, ranks: int, stride: int, rate: float
) -> None:
    links = GroupLinks.of(cluster, ranks, stride=stride)
    assert links.rate == pytest.approx(LINK_SHARE * rate)


def test_seconds_of_a_payload() -> None:
    links = GroupLinks.of(FOUR, 32)
    gathered = links.seconds(Payload(all_gather=32e9), 32, messages=2)
    hops = 28 * LINK_SECONDS + 3 * NETWORK_SECONDS
    assert gathered == pytest.approx(31e9 / (LINK_SHARE * 200e9) + 2 * hops)
    assert links.seconds(Payload(all_reduce=1e9), 32) < links.seconds(Payload(all_gather=3e9), 32)
    assert GroupLinks.of(NODE, 1).seconds(Payload(all_gather=1e9), 1) == 0


def messages(cluster: Cluster, *words: str):  # type: ignore[no-untyped-def]
    run = run_of(cluster, *words)
    inventory = take_inventory(run.config, run.architecture, run.method)
    return message_seconds(run, inventory, cluster)


def test_what_a_backend_overlaps() -> None:
    ddp, fsdp = messages(FOUR), messages(FOUR, "--parallel.backend=fsdp2")
    zero2 = messages(FOUR, "--parallel.backend=deepspeed", "--parallel.zero_stage=2")
    zero3 = messages(FOUR, "--parallel.backend=deepspeed", "--parallel.zero_stage=3")
    megatron = messages(FOUR, "--parallel.backend=megatron")
    for found in (ddp, fsdp, zero3, megatron):
        assert found.overlapped > 0 and found.exposed == 0
    assert zero2.overlapped == 0 and zero2.exposed > 0
    assert fsdp.overlapped > ddp.overlapped  # frozen weights are gathered as well
    assert ddp.swap > 0
    tp = messages(FOUR, "--parallel.backend=fsdp2", "--parallel.tensor_parallel=2")
    assert tp.exposed > 0


def test_replicas_on_nodes_send_less_between_them() -> None:
    everywhere = messages(FOUR, "--parallel.backend=fsdp2")
    inside = messages(FOUR, "--parallel.backend=fsdp2", "--parallel.shard_group=8")
    assert inside.overlapped < everywhere.overlapped


def test_one_rank_sends_nothing() -> None:
    alone = Cluster(gpu=gpu_named("h100"), nodes=1, gpus_per_node=1)
    found = messages(alone)
    assert (found.overlapped, found.exposed, found.swap) == (0, 0, 0)
