"""Residuals of eight bits on several ranks: the whole numbers of one process, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_in_turn

STEPS, STOP, BATCH, WORLD = 6, 3, 12, 2  # swaps after 2, 4 and 6: stopped inside an iteration
SETTINGS: dict[str, Any] = {
    "spectral__residual_dtype": "int8",
    "spectral__steps_per_iteration": 2,
    "spectral__iteration_warmup_steps": 1,
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full updates
}


def runs(corpus: Path, folder: Path, world: int, *, parts: int = 1) -> list[Any]:
    """One run in double precision; one in bf16 without a stop, and one that stops and goes on."""

    def configured(name: str, precision: str) -> Any:
        micro = BATCH // (world * parts)
        changes = SETTINGS | {"train__precision": precision, "train__micro_batch_size": micro}
        return tiny_config(corpus, folder / name, **changes)

    stopped = configured("stopped", "bf16")
    return [
        (configured("double", "fp64"), None),
        (configured("straight", "bf16"), None),
        (stopped, STOP),
        (stopped, None),
    ]


def frozen(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result["tensors"].items() if k.startswith("frozen/")}


def different(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not np.array_equal(found[name], value)]


@pytest.mark.fast
def test_ddp_equals_one_process(corpus: Path, tmp_path: Path) -> None:
    """Same losses, and whole numbers and scales equal to the bit, on every rank; exact resume
    inside an iteration, alone and on two ranks."""
    many = run_distributed(train_in_turn, WORLD, runs(corpus, tmp_path / "many", WORLD, parts=3))
    one = run_distributed(train_in_turn, 1, runs(corpus, tmp_path / "one", 1))

    expected = one[0][0]
    whole = [v for k, v in frozen(expected).items() if k.endswith(".residual")]
    assert whole and all(value.dtype == np.int8 for value in whole)
    for rank in many:
        assert different(frozen(rank[0]), frozen(expected)) == []
        assert different(frozen(rank[1]), frozen(many[0][1])) == []
    losses = many[0][0]["losses"]
    assert losses.keys() == expected["losses"].keys()
    assert max(abs(losses[s] - expected["losses"][s]) for s in losses) < 1e-9

    for _, straight, first, second in [*many, *one]:
        assert first["step"] == STOP and second["step"] == STEPS
        assert different(second["tensors"], straight["tensors"]) == []
    for _, straight, first, second in (many[0], one[0]):
        assert first["losses"] | second["losses"] == straight["losses"]
