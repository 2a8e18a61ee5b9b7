"""The work of a swap divides over ranks as the owner map says, operation by operation."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.methods.owners import assign_owners
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config

WIDTH, LAYERS = 32, 2
NAMES = {
    f"model.decoder.layers.{i}.{part}": shape
    for i in range(LAYERS)
    for part, shape in {
        **{f"self_attn.{p}": (WIDTH, WIDTH) for p in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "fc1": (4 * WIDTH, WIDTH),
        "fc2": (WIDTH, 4 * WIDTH),
    }.items()
}
Work = dict[str, Counter[tuple[int, int]]]


def count_work(config: Any, fault: bool) -> Work:
    """Shapes of the matrices that this rank decomposes and rebuilds at one swap."""
    import torch

    from spectral_scale.methods.sst import bank, controller
    from spectral_scale.methods.sst.swap import Swap
    from spectral_scale.testing.tiny import train_tiny

    work: Work = {"svd": Counter(), "rebuild": Counter()}
    compose, svd, run = bank.compose, torch.linalg.svd, Swap.run

    def shape_of(matrix: Any) -> tuple[int, int]:
        m, n = matrix.shape
        return max(m, n), min(m, n)

    def counted_svd(matrix: Any, **keywords: Any) -> Any:
        work["svd"][shape_of(matrix)] += 1
        return svd(matrix, **keywords)

    def counted_compose(u: Any, sigma: Any, v: Any) -> Any:
        result = compose(u, sigma, v)
        work["rebuild"][shape_of(result)] += 1
        return result

    def counted(swap: Swap, iteration: int) -> Any:
        torch.linalg.svd, bank.compose = counted_svd, counted_compose
        report = run(swap, iteration)
        torch.linalg.svd, bank.compose = svd, compose
        return report

    Swap.run = counted  # type: ignore[method-assign]
    if fault:
        controller.assign_owners = lambda shapes, world_size: dict.fromkeys(shapes, 0)
    train_tiny(config)
    return work


def work_of(rank: int, world: int) -> Work:
    """What the owner map gives a rank: each matrix is composed for its SVD and for its residual."""
    owners = assign_owners(NAMES, world)
    mine = Counter((max(s), min(s)) for name, s in NAMES.items() if owners[name] == rank)
    return {"svd": mine, "rebuild": mine + mine}


def cost(work: Work) -> int:
    """Multiplications up to a factor."""
    return sum(count * m * n * n for (m, n), count in work["svd"].items())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_work_divides(world: int, corpus: Path, tmp_path: Path) -> None:
    config = one_swap(corpus, tmp_path)
    ranks = run_distributed(count_work, world, config, False)
    assert ranks == [work_of(rank, world) for rank in range(world)]
    assert sum(map(cost, ranks)) == cost(work_of(0, 1))
    # 8 small and 4 large matrices of four times the cost: they divide without remainder
    assert {cost(work) for work in ranks} == {cost(work_of(0, 1)) // world}


def test_work_that_does_not_divide_would_show(corpus: Path, tmp_path: Path) -> None:
    """The twin gives every matrix to rank 0."""
    ranks = run_distributed(count_work, 2, one_swap(corpus, tmp_path), True)
    assert [cost(work) for work in ranks] == [cost(work_of(0, 1)), 0]


def one_swap(corpus: Path, folder: Path) -> Any:
    """Four steps, then a swap with the re-SVD of every matrix."""
    changes = {"train__steps": 4, "train__global_batch_size": 4, "train__micro_batch_size": 1}
    return tiny_config(corpus, folder, spectral__iterations_per_round=1, **changes)
