"""Muon and SCALE on several ranks against one process; exact resume; what sharded factors send."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_in_turn

STEPS, STOP, BATCH, WORLD = 6, 3, 12, 2  # swaps after 2, 4 and 6: stopped inside an iteration
FACTORS: dict[str, Any] = {
    "spectral__form": "tangent",
    "spectral__steps_per_iteration": 2,
    "spectral__iteration_warmup_steps": 1,
    "optimizer__name": "muon",
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full updates
    "optimizer__clip_grad_norm": 0.1,
    "train__precision": "fp64",
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
}
MATRICES = FACTORS | {"spectral__form": "sst", "spectral__method": "full"}
SCALE = MATRICES | {"optimizer__name": "scale"}
FSDP2 = FACTORS | {"parallel__backend": "fsdp2"}
CASES = {"DDP": FACTORS, "FSDP2": FSDP2, "HSDP": FSDP2 | {"parallel__shard_group": 1}}


def configured(corpus: Path, run_dir: Path, world: int, changes: Mapping[str, Any]) -> Any:
    micro = {"train__micro_batch_size": BATCH // world}
    return tiny_config(corpus, run_dir, **(micro | dict(changes)))


def in_turn(
    world: int, corpus: Path, folder: Path, cases: Mapping[str, Any], stop: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Results by case and rank."""
    runs = [(configured(corpus, folder / n, world, c), stop) for n, c in cases.items()]
    ranks = run_distributed(train_in_turn, world, runs, timeout_seconds=300)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process's results for factors and for dense matrices."""
    cases = {"factors": FACTORS, "matrices": MATRICES, "scale": SCALE}
    found = in_turn(1, corpus, tmp_path_factory.mktemp("alone"), cases)
    return {name: ranks[0] for name, ranks in found.items()}


@pytest.fixture(scope="module")
def together(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of two ranks."""
    folder = tmp_path_factory.mktemp("together")
    return in_turn(WORLD, corpus, folder, CASES | {"dense": MATRICES, "scale": SCALE})


@pytest.mark.parametrize("case", CASES)
def test_factors_equal_one_process(
    case: str, alone: dict[str, Any], together: dict[str, Any]
) -> None:
    found = distance(together[case], alone["factors"])
    assert found.loss < 1e-12, found
    assert max(found.weights, found.factors, found.moments) < 1e-8, found
    assert found.steps_equal


def test_ddp_of_dense_matrices(alone: dict[str, Any], together: dict[str, Any]) -> None:
    """torch's Muon multiplies in bf16, so that rounding errors of gradients may grow to its."""
    found = distance(together["dense"], alone["matrices"])
    assert found.loss < 1e-3 and found.weights < 1e-3, found
    first, second = (rank["tensors"] for rank in together["dense"])
    shared = [name for name in first if name in second]
    assert all(np.array_equal(first[name], second[name]) for name in shared)


def test_ddp_of_scale(alone: dict[str, Any], together: dict[str, Any]) -> None:
    found = distance(together["scale"], alone["scale"])
    assert found.loss < 1e-12 and max(found.weights, found.moments) < 1e-8, found


def test_resume_is_bit_exact(corpus: Path, tmp_path: Path, together: dict[str, Any]) -> None:
    """Stopped inside an iteration, where momentum is not zero; fresh processes go on."""
    cases = {"FSDP2": FSDP2, "dense": MATRICES, "scale": SCALE}
    first = in_turn(WORLD, corpus, tmp_path, cases, STOP)
    second = in_turn(WORLD, corpus, tmp_path, cases)
    for name in cases:
        for whole, before, after in zip(together[name], first[name], second[name], strict=True):
            assert before["losses"] | after["losses"] == whole["losses"]
            assert after["tensors"].keys() == whole["tensors"].keys()
            different = [
                k for k, v in whole["tensors"].items() if not np.array_equal(after["tensors"][k], v)
            ]
            assert not different
        kept = [tensor for rank in first[name] for tensor in rank["tensors"].items()]
        assert any("/momentum_buffer" in key and value.any() for key, value in kept), name


def step_and_twin(config: Any) -> dict[str, Any]:
    """What an update sends beside gradients, and how far one goes without the sums over shards."""
    import torch

    from spectral_scale.optim import muon
    from spectral_scale.parallel.dtensor_collectives import local
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.tiny import build_from_config
    from spectral_scale.testing.traffic import TrafficCounter

    create_run_folder(Path(config.train.run_dir))
    run = build_from_config(config, detect_rank_info())
    factors = [
        p for g in run.optimizer.param_groups if g["name"] == "low_rank" for p in g["params"]
    ]

    def update() -> list[torch.Tensor]:
        for i, factor in enumerate(factors):
            local(factor).zero_()
            local(run.optimizer.state[factor]["momentum_buffer"]).zero_()
            generator = torch.Generator().manual_seed(100 * i + run.backend.data_rank)
            values = torch.randn(local(factor).shape, generator=generator)
            factor.grad = torch.zeros_like(factor)
            local(factor.grad).copy_(values)
        run.optimizer.step()
        return [local(factor).clone() for factor in factors]

    with TrafficCounter() as counter:
        true = update()
    expected = sum(min(f.shape) ** 2 for f in factors) * true[0].itemsize
    summed = muon.sum_over_shards
    muon.sum_over_shards = lambda values, _: list(values)  # type: ignore[assignment]
    apart = update()
    muon.sum_over_shards = summed
    gap = max(float((a - b).abs().max()) for a, b in zip(true, apart, strict=True))
    run.backend.close()
    return {"sent": dict(counter.payload_bytes), "expected": expected, "gap": gap}


def test_an_update_sends_gram_matrices_alone(corpus: Path, tmp_path: Path) -> None:
    """No factor and no matrix is gathered; the twin that forgets the sums steps elsewhere."""
    config = configured(corpus, tmp_path, WORLD, FSDP2)
    for rank in run_distributed(step_and_twin, WORLD, config):
        assert sum(rank["sent"].values()) == rank["expected"], rank
        assert rank["gap"] > 1e-5
