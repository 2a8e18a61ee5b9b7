"""The tangent form on several ranks against one process; exact resume; bytes as by formula."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import CLIPPED, DEEPSPEED, OFFLOADED

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble, distance
from spectral_scale.testing.tiny import tiny_config, train_in_turn

STEPS, STOP, BATCH, WORLD = 6, 3, 12, 2  # swaps after 2, 4 and 6: stopped inside an iteration
SETTINGS: dict[str, Any] = {
    "spectral__form": "tangent",
    "spectral__steps_per_iteration": 2,
    "spectral__iteration_warmup_steps": 1,
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full updates
} | CLIPPED
DOUBLE, SINGLE = {"train__precision": "fp64"}, {"train__precision": "fp32"}
BF16 = {"train__precision": "bf16"}
RANDOM, SVD = {"spectral__basis": "random"}, {"spectral__basis": "svd"}
FSDP2 = {"parallel__backend": "fsdp2"}
REPLICATED = {"parallel__residual": "replicated"}
REPLICAS = {"parallel__shard_group": 1}
ZERO = {stage: DEEPSPEED | {"parallel__zero_stage": stage} for stage in range(4)}

CASES: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "torch": {"DDP": (DOUBLE | RANDOM, 3), "DDP, svd": (DOUBLE | SVD, 1)},
    "fsdp2": {
        "FSDP2": (DOUBLE | RANDOM | FSDP2, 1),
        "FSDP2, svd, base replicated": (DOUBLE | SVD | FSDP2 | REPLICATED, 3),
        "HSDP": (DOUBLE | RANDOM | FSDP2 | REPLICAS, 1),
    },
    "deepspeed": {
        "ZeRO-0": (SINGLE | RANDOM | ZERO[0], 1),
        "ZeRO-1": (SINGLE | RANDOM | ZERO[1], 3),
        "ZeRO-2, svd": (SINGLE | SVD | ZERO[2], 1),
        "ZeRO-3": (SINGLE | RANDOM | ZERO[3], 1),
        "ZeRO-3, svd, offload": (SINGLE | SVD | ZERO[3] | OFFLOADED, 1),
    },
}
"""Settings, and micro-batches a step; the same processes train a group, as they take longer to
start than to train."""


def configured(corpus: Path, run_dir: Path, world: int, changes: Mapping[str, Any], parts: int = 1):
    micro = {"train__micro_batch_size": BATCH // (world * parts)}
    return tiny_config(corpus, run_dir, **(SETTINGS | micro | dict(changes)))


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process's results on plain torch, by precision and basis."""
    kinds = {
        f"{precision['train__precision']} {basis['spectral__basis']}": precision | basis
        for precision in (DOUBLE, SINGLE)
        for basis in (RANDOM, SVD)
    }
    folder = tmp_path_factory.mktemp("alone")
    runs = [(configured(corpus, folder / k, 2, changes), None) for k, changes in kinds.items()]
    found = run_distributed(train_in_turn, 1, runs, timeout_seconds=400)[0]
    return dict(zip(kinds, found, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", CASES)
def test_equals_one_process(
    group: str, corpus: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    """Every trained tensor, moment and step count, every weight of the owners, the same bases."""
    cases = CASES[group]
    runs = [
        (configured(corpus, tmp_path / name, WORLD, changes, parts), None)
        for name, (changes, parts) in cases.items()
    ]
    ranks = run_distributed(train_in_turn, WORLD, runs, timeout_seconds=400)
    for i, (name, (changes, _)) in enumerate(cases.items()):
        results = [rank[i] for rank in ranks]
        expected = alone[f"{changes['train__precision']} {changes['spectral__basis']}"]
        exact = changes["train__precision"] == "fp64"
        found = distance(results, expected)
        assert found.loss < (1e-12 if exact else 1e-5), (name, found)
        assert max(found.weights, found.factors) < (1e-9 if exact else 1e-3), (name, found)
        assert found.steps_equal, name
        gaps = kept_gaps(results, expected)
        assert max(gaps["base"]) < (1e-9 if exact else 1e-3), (name, gaps)
        if changes["spectral__basis"] == "random":
            assert gaps["basis"] == [0.0] * 12, (name, gaps)


def kept_gaps(results: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, list[float]]:
    """Largest differences of what owners keep, matrix by matrix."""
    found, reference = assemble(results), assemble([expected])
    gaps: dict[str, list[float]] = {"base": [], "basis": []}
    for key, value in reference.items():
        kind = key.partition("/")[0]
        if kind in gaps:
            gaps[kind].append(float(np.abs(found[key] - value).max()))
    return gaps


def test_a_rank_with_other_bases_would_show(corpus: Path, tmp_path: Path) -> None:
    """The twin: on another seed, and so on other bases, the same data train other numbers."""
    runs = [
        (configured(corpus, tmp_path / basis, 1, RANDOM | {"spectral__basis": basis}), None)
        for basis in ("random", "svd")
    ]
    one, other = run_distributed(train_in_turn, 1, runs)[0]
    assert one["losses"][1] == pytest.approx(other["losses"][1], abs=1e-6)
    assert abs(one["losses"][STEPS] - other["losses"][STEPS]) > 1e-4


RESUMED = {
    "DDP": BF16 | RANDOM,
    "FSDP2, svd": BF16 | SVD | FSDP2,
    "ZeRO-1": BF16 | RANDOM | ZERO[1],
    "ZeRO-3": BF16 | SVD | ZERO[3],
}


@pytest.mark.timeout(600)
def test_resume_is_bit_exact(corpus: Path, tmp_path: Path) -> None:
    """Stopped inside an iteration; fresh processes go on: losses and every tensor of every rank.

    Whether ZeRO-3 holds a frozen weight whole at the end depends on the last pass.
    """

    def turn(folder: str, stop: int | None) -> list[list[dict[str, Any]]]:
        runs = [
            (configured(corpus, tmp_path / folder / name, WORLD, changes), stop)
            for name, changes in RESUMED.items()
        ]
        return run_distributed(train_in_turn, WORLD, runs, timeout_seconds=400)

    whole, first, second = turn("whole", None), turn("parts", STOP), turn("parts", None)
    for rank in range(WORLD):
        for i, name in enumerate(RESUMED):
            before, after, expected = first[rank][i], second[rank][i], whole[rank][i]
            assert before["step"] == STOP, name
            assert before["losses"] | after["losses"] == expected["losses"], name
            assert after["tensors"].keys() == expected["tensors"].keys(), name
            different = [
                key
                for key, value in expected["tensors"].items()
                if not (name == "ZeRO-3" and key.startswith("frozen/"))
                and not np.array_equal(after["tensors"][key], value)
            ]
            assert different == [], name


def test_it_goes_on_on_another_backend(corpus: Path, tmp_path: Path) -> None:
    """Saved by two ranks of FSDP2, continued by one process: losses within rounding."""
    changes = DOUBLE | RANDOM
    straight = configured(corpus, tmp_path / "straight", WORLD, changes)
    broken = configured(corpus, tmp_path / "parts", WORLD, changes | FSDP2)
    expected = run_distributed(train_in_turn, 1, [(straight, None)])[0][0]["losses"]
    run_distributed(train_in_turn, WORLD, [(broken, STOP)])
    alone = configured(corpus, tmp_path / "parts", WORLD, changes)
    found = run_distributed(train_in_turn, 1, [(alone, None)])[0][0]["losses"]
    assert sorted(found) == list(range(STOP + 1, STEPS + 1))
    assert all(abs(found[s] - expected[s]) < 1e-9 for s in found)


def costs(config: Any) -> dict[str, Any]:
    """What a swap sends, and what this rank keeps and saves."""
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.tiny import build_from_config
    from spectral_scale.testing.traffic import TrafficCounter

    create_run_folder(Path(config.train.run_dir))
    run = build_from_config(config, detect_rank_info())
    loop = TrainingLoop(run, NullLog(), None)
    for batch in run.loader.steps(0, 1):
        loop._one_step(batch)
    controller: Any = run.controller
    swap, trained = controller.swap, [f"{n}.{leaf}" for n in controller.layers for leaf in "cd"]
    counted: dict[str, Any] = {"kept": controller.nbytes()}
    counted["saved"] = sum(t.nbytes for _, t in controller.state_tensors())
    for name, action in (
        ("scatter", swap.scatter),
        ("zero", lambda: swap._zero(trained)),
        ("twin", lambda: swap._delivery.scatter(with_factors(swap), trained=True)),
    ):
        with TrafficCounter() as counter:
            action()
        counted[name] = sum(counter.payload_bytes[k] for k in ("broadcast", "scatter", "send"))
    run.backend.close()
    return counted


def with_factors(swap: Any) -> Any:
    """A build that sends the zeros, too."""
    import torch

    def build(name: str, trained: bool) -> dict[str, torch.Tensor]:
        shapes = swap.layers[name].trained_shapes()
        return swap._build(name, trained) | {k: torch.zeros(s) for k, s in shapes.items()}

    return build


@pytest.mark.parametrize("basis", ["random", "svd"])
def test_traffic_and_bytes_are_those_of_the_plan(basis: str, corpus: Path, tmp_path: Path) -> None:
    """In bf16: owners send the bf16 weights and bases, and keep fp32 weights and keys."""
    from spectral_scale.config.resolve import resolve
    from spectral_scale.plan.build import plan_run

    changes = BF16 | {"spectral__basis": basis}
    config = configured(corpus, tmp_path, WORLD, changes)
    plan = plan_run(resolve(config, world_size=WORLD), gpu_memory_bytes=80e9)
    ranks = run_distributed(costs, WORLD, config)
    sent = {rank["scatter"] for rank in ranks}
    assert sent == {plan.boundary_traffic_bytes * WORLD // (WORLD - 1)}
    assert [rank["zero"] for rank in ranks] == [0, 0]
    assert all(rank["twin"] > rank["scatter"] for rank in ranks)
    assert plan.memory["bank"] == max(rank["kept"] for rank in ranks)
    elements, columns = 2 * (4 * 32 * 32 + 2 * 128 * 32), 2 * (4 * 64 + 2 * 160)
    state = 16 * 12 if basis == "random" else 4 * 8 * columns
    saved = sum(rank["saved"] for rank in ranks)
    assert saved == 4 * elements + state == sum(rank["kept"] for rank in ranks)
    assert plan.checkpoint_bytes == 12 * plan.parameters_trained + saved
    assert (plan.memory["svd_workspace"] == 0) is (basis == "random")
