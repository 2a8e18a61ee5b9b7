"""The few collectives over gloo, and their one-process twin."""

from typing import Any

import torch
import torch.distributed as dist

from spectral_scale.parallel.collective import Collective, ProcessGroup, SingleProcess
from spectral_scale.testing.distributed import run_distributed

LONG = "x" * 5000


def exercise(world_size: int) -> dict[str, Any]:
    """Every method once; what this rank saw."""
    collective: Collective = SingleProcess()
    if world_size > 1:
        dist.init_process_group("gloo")
        collective = ProcessGroup(torch.device("cpu"))
    rank, last = collective.rank, collective.world_size - 1
    collective.barrier()
    value = torch.tensor([1.0 + rank, -0.0, float("inf")])
    seen = {
        "rank": rank,
        "gathered": collective.gather_json({"rank": rank, "text": LONG[: 10 * rank]}),
        "from last": collective.broadcast_json([rank, None, 1.5], source=last),
        "all well": collective.agree(None, what="work"),
        "last fails": collective.agree(LONG if rank == last else None, what="work"),
        "all fail": collective.agree(f"error of {rank}", what="work"),
        "sum": collective.all_reduce_sum(torch.tensor([1.0, rank])).tolist(),
        "broadcast": collective.broadcast(value, last).tolist(),
    }
    if world_size > 1:
        dist.barrier()
    return seen


def expected(rank: int, world_size: int) -> dict[str, Any]:
    last = world_size - 1
    gathered = [{"rank": k, "text": LONG[: 10 * k]} for k in range(world_size)]
    return {
        "rank": rank,
        "gathered": gathered if rank == 0 else None,
        "from last": [last, None, 1.5],
        "all well": None,
        "last fails": f"rank {last}: work: {LONG}",
        "all fail": "rank 0: work: error of 0",
        "sum": [world_size, sum(range(world_size))],
        "broadcast": [1.0 + last, -0.0, float("inf")],
    }


def test_alone() -> None:
    assert exercise(1) == expected(0, 1)


def test_three_ranks_see_the_same() -> None:
    assert run_distributed(exercise, 3, 3) == [expected(rank, 3) for rank in range(3)]
