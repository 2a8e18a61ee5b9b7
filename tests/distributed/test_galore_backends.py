"""GaLore on every host that cuts or flattens matrices, against one process."""

from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_in_turn

STEPS, BATCH = 6, 48  # projectors are renewed before steps 1 and 5
SETTINGS: dict[str, Any] = {
    "spectral__method": "galore",
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "train__eval_interval": 100,
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full steps
    "optimizer__weight_decay": 0.1,
}
CLIPPED = {"optimizer__clip_grad_norm": 0.1}  # below the norms of both kinds
DOUBLE = {"train__precision": "fp64"}
DEEPSPEED = {"parallel__backend": "deepspeed"}
OFFLOADED = {"parallel__offload": "cpu"}
FSDP2 = {"parallel__backend": "fsdp2"}
HOSTS: dict[str, dict[str, Any]] = {
    "torch": {},
    "fsdp2": FSDP2,
    "hsdp": FSDP2 | {"parallel__shard_group": 2},
    "copies": FSDP2 | {"parallel__shard_group": 1},
    **{f"zero{stage}": DEEPSPEED | {"parallel__zero_stage": stage} for stage in range(4)},
    "zero2+offload": DEEPSPEED | {"parallel__zero_stage": 2} | OFFLOADED,
    "zero3+offload": DEEPSPEED | {"parallel__zero_stage": 3} | OFFLOADED,
}
FSDP2_CASES = {1: [("fsdp2", 4)], 3: [("fsdp2", 4), ("copies", 1)], 4: [("hsdp", 4), ("fsdp2", 1)]}


def config_of(
    corpus: Path, folder: Path, host: str, world: int, accumulation: int = 1, **changes: Any
) -> Any:
    micro = {"train__micro_batch_size": BATCH // (world * accumulation)}
    return tiny_config(corpus, folder / host, **(SETTINGS | micro | HOSTS[host] | changes))


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process' results."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {"fp64": CLIPPED | DOUBLE, "fp32": CLIPPED, "bf16": {"train__precision": "bf16"}}
    runs = [
        (config_of(corpus, folder / name, "torch", 1, **changes), None)
        for name, changes in cases.items()
    ]
    (results,) = run_distributed(train_in_turn, 1, runs)
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("world", FSDP2_CASES)
def test_fsdp2_equals_one_process(
    world: int, corpus: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    """In double precision every tensor is the same, projectors and moments in them included."""
    runs = [
        (config_of(corpus, tmp_path / str(a), host, world, a, **CLIPPED, **DOUBLE), None)
        for host, a in FSDP2_CASES[world]
    ]
    ranks = run_distributed(train_in_turn, world, runs, timeout_seconds=120)
    for index, case in enumerate(FSDP2_CASES[world]):
        found = distance([rank[index] for rank in ranks], alone["fp64"])
        assert max(found.loss, found.weights, found.factors, found.moments) < 1e-9, case
        assert found.steps_equal, case
    assert_reports(ranks[0][0])


def assert_reports(result: dict[str, Any]) -> None:
    pass
