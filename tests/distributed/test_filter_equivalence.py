"""The spectral filter on every host against one process: losses, weights, graphs, anchors."""

from pathlib import Path
from typing import Any

import pytest
from run_settings import DEEPSPEED, DOUBLE

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.filters import JOINT, KNN, compare_measures
from spectral_scale.testing.filters import SETTINGS as FILTERED
from spectral_scale.testing.tiny import tiny_config, train_in_turn

STEPS, BATCH = 3, 24
SETTINGS: dict[str, Any] = FILTERED | {
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "train__eval_interval": STEPS,
}
FULL = {"spectral__method": "full"}
CASES: dict[str, dict[str, Any]] = {
    "frod": JOINT
    | {
        "spectral__method": "frod",
        "spectral__sparsity": 0.05,
        # All but fc2, whose short stack has a null space, where any basis is as good as another.
        "spectral__targets": "[q_proj,k_proj,v_proj,out_proj,fc1]",
    },
    "layers": FULL | KNN | JOINT,
    "sigma": JOINT | {"filter__kind": "heat", "filter__anchor_steps": 0},
    "rows": FULL | KNN | {"filter__nodes": "rows"},
    "heads": FULL | {"filter__nodes": "heads", "filter__norm_matched": True},
    "block_gains": {"spectral__method": "lora", "filter__nodes": "block_gains"},
}
HOSTS: dict[str, dict[str, Any]] = {
    "torch": DOUBLE,
    "fsdp2": DOUBLE | {"parallel__backend": "fsdp2"},
    "hsdp": DOUBLE | {"parallel__backend": "fsdp2", "parallel__shard_group": 2},
    "zero0": DEEPSPEED | {"parallel__zero_stage": 0},
    "zero1": DEEPSPEED | {"parallel__zero_stage": 1},
    "zero2": DEEPSPEED | {"parallel__zero_stage": 2},
    "zero3": DEEPSPEED | {"parallel__zero_stage": 3},
    "zero2+offload": DEEPSPEED | {"parallel__zero_stage": 2, "parallel__offload": "cpu"},
    "zero3+offload": DEEPSPEED | {"parallel__zero_stage": 3, "parallel__offload": "cpu"},
}


def configs(corpus: Path, folder: Path, host: str, world: int) -> list[tuple[Any, None]]:
    """One run of each case."""
    micro = {"train__micro_batch_size": BATCH // (2 * world)}
    return [
        (tiny_config(corpus, folder / host / name, **(SETTINGS | micro | HOSTS[host] | case)), None)
        for name, case in CASES.items()
    ]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """One process' results of all cases, in double and in single precision."""
    folder = tmp_path_factory.mktemp("alone")
    double = configs(corpus, folder / "double", "torch", 1)
    single = [
        (tiny_config(corpus, folder / name, train__micro_batch_size=12, **(SETTINGS | case)), None)
        for name, case in CASES.items()
    ]
    (results,) = run_distributed(train_in_turn, 1, double + single, timeout_seconds=300)
    return {"fp64": results[: len(double)], "fp32": results[len(double) :]}


@pytest.mark.parametrize(
    ("world", "hosts"),
    [
        (2, ("torch", "zero0", "zero2+offload")),
        (3, ("zero1", "zero2", "zero3")),
        (4, ("fsdp2", "hsdp", "zero3+offload")),
    ],
    ids=str,
)
def test_equals_one_process(
    world: int,
    hosts: tuple[str, ...],
    corpus: Path,
    tmp_path: Path,
    alone: dict[str, list[Any]],
) -> None:
    """Clipping and accumulation on, across a swap and renewed graphs. In double precision every
    tensor is the same; ZeRO trains fp32 masters."""
    runs = [run for host in hosts for run in configs(corpus, tmp_path, host, world)]
    ranks = run_distributed(train_in_turn, world, runs, timeout_seconds=600)
    for index, (config, _) in enumerate(runs):
        precision = config.train.precision
        reference = alone[precision][index % len(CASES)]
        found = distance([rank[index] for rank in ranks], reference)
        where = config.train.run_dir
        assert found.loss < (1e-12 if precision == "fp64" else 1e-5), where
        assert found.weights < (1e-9 if precision == "fp64" else 1e-3), where
        assert found.steps_equal and found.indices_equal, where
        assert_same_measures(ranks[0][index]["lines"], reference["lines"], where)


def assert_same_measures(found: list[Any], expected: list[Any], where: str) -> None:
    """What was removed, frequencies and drift at every step."""
    for _, reference in expected:
        keys = {key for key in reference if key.startswith("filter/")}
        assert not keys or {"filter/drift", "filter/isolated_nodes"} <= keys
    _, different = compare_measures(found, expected, rel=2e-3, abs_=1e-5, energy_rel=1e-4)
    assert not different, (where, different[:3])
