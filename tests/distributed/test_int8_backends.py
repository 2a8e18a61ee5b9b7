"""Residuals of eight bits on several ranks: the whole numbers of one process, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np

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
FSDP2 = {"parallel__backend": "fsdp2"}
BACKENDS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": FSDP2,
    "FSDP2, residuals replicated": FSDP2 | {"parallel__residual": "replicated"},
    "HSDP": FSDP2 | {"parallel__shard_group": 1},
}


def runs(
    corpus: Path, folder: Path, world: int, changes: dict[str, Any], parts: int = 1
) -> list[Any]:
    """One run in double precision; one in bf16 without a stop, and one that stops and goes on."""

    def configured(name: str, precision: str) -> Any:
        micro = BATCH // (world * parts)
        given = SETTINGS | {"train__precision": precision, "train__micro_batch_size": micro}
        return tiny_config(corpus, folder / name, **(given | changes))

    stopped = configured("stopped", "bf16")
    return [
        (configured("double", "fp64"), None),
        (configured("straight", "bf16"), None),
        (stopped, STOP),
        (stopped, None),
    ]


def frozen(ranks: list[dict[str, Any]], whole: dict[str, Any]) -> dict[str, Any]:
    """Frozen weights by name, put together from the ranks that hold shards of them."""
    names = [name for name in whole if name.startswith("frozen/")]
    found = {}
    for name in names:
        parts = [rank["tensors"][name] for rank in ranks]
        sharded = parts[0].shape != whole[name].shape
        if not sharded:
            assert all(np.array_equal(part, parts[0]) for part in parts), name
        found[name] = np.concatenate(parts) if sharded else parts[0]
    return found


def different(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not np.array_equal(found[name], value)]


def test_ranks_equal_one_process(corpus: Path, tmp_path: Path) -> None:
    """Same losses, and whole numbers and scales equal to the bit, whole or sharded by rows; exact
    resume inside an iteration, alone and on two ranks of each backend."""
    planned = [
        run
        for name, changes in BACKENDS.items()
        for run in runs(corpus, tmp_path / name, WORLD, changes, parts=3)
    ]
    many = run_distributed(train_in_turn, WORLD, planned)
    one = run_distributed(train_in_turn, 1, runs(corpus, tmp_path / "one", 1, {}))[0]

    expected = {k: v for k, v in one[0]["tensors"].items() if k.startswith("frozen/")}
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in expected.items()}
    assert kinds == {"residual": np.int8, "residual_scale": np.float32}
    for i, name in enumerate(BACKENDS):
        ranks = [rank[4 * i : 4 * i + 4] for rank in many]
        assert different(frozen([rank[0] for rank in ranks], expected), expected) == [], name
        losses = ranks[0][0]["losses"]
        assert losses.keys() == one[0]["losses"].keys()
        assert max(abs(losses[s] - one[0]["losses"][s]) for s in losses) < 1e-9, name
        sharded = [v for k, v in ranks[0][0]["tensors"].items() if k.endswith(".residual")]
        rows = {value.shape[0] for value in sharded}
        assert rows == ({16, 64} if name == "FSDP2" else {32, 128}), name
        for rank in ranks:
            resumes_exactly(*rank[1:])
    resumes_exactly(*one[1:])


def resumes_exactly(
    straight: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    """Losses and every tensor, as without the stop."""
    assert first["step"] == STOP and second["step"] == STEPS
    assert different(second["tensors"], straight["tensors"]) == []
    assert first["losses"] | second["losses"] == straight["losses"]
