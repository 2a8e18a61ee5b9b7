"""FSDP2 checkpoints: bit-exact on the same ranks, whole on any other number and backend."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS, STOP = 9, 6  # swaps after 4 and 8 (re-SVD): saved inside an iteration
SETTINGS: dict[str, Any] = {
    "train__steps": STEPS,
    "train__precision": "fp64",
    "train__micro_batch_size": 1,
    "optimizer__spectral_lr": 1e-4,
}
BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {},
    "fsdp2": {"parallel__backend": "fsdp2"},
    "hsdp": {"parallel__backend": "fsdp2", "parallel__shard_group": 2},
}


def resume(config: Any) -> dict[str, Any]:
    """Train on, and keep the state that this rank held when it began."""
    from spectral_scale.engine.loop import TrainingLoop

    loaded: dict[str, Any] = {}
    train = TrainingLoop.train

    def recording(loop: TrainingLoop) -> Any:
        assert loop.step == STOP
        for chunk in loop.run.backend.state_chunks():
            loaded[chunk.key] = chunk.tensor.clone().numpy()
        if loop.run.controller is not None:
            for name, tensor in loop.run.controller.state_tensors():
                loaded[name] = tensor.clone().numpy()
        return train(loop)

    TrainingLoop.train = recording  # type: ignore[method-assign]
    return train_tiny(config) | {"loaded": loaded}


@pytest.mark.parametrize(
    ("saved_on", "saved_by", "loads"),
    [
        ("fsdp2", 4, [("fsdp2", 2), ("torch", 1), ("hsdp", 4)]),
        ("hsdp", 4, [("fsdp2", 1)]),
        ("torch", 2, [("fsdp2", 3)]),
    ],
    ids=str,
)
def test_resume_elsewhere(
    saved_on: str,
    saved_by: int,
    loads: list[tuple[str, int]],
    corpus: Path,
    tmp_path: Path,
    straight: dict[str, Any],
) -> None:
    """The state is bit-identical after loading, and the run goes on as if undisturbed."""
    config = tiny_config(corpus, tmp_path / "saved", **(SETTINGS | BACKENDS[saved_on]))
    before = run_distributed(train_tiny, saved_by, config, STOP)
    assert before[0]["step"] == STOP
    expected = assemble(before)
    for backend, world in loads:
        folder = tmp_path / f"{backend}_{world}"
        shutil.copytree(tmp_path / "saved", folder)
        settings = SETTINGS | BACKENDS[backend]
        ranks = run_distributed(resume, world, tiny_config(corpus, folder, **settings))
        found = assemble([{"tensors": rank["loaded"]} for rank in ranks])
        assert found.keys() == expected.keys()
        assert not [k for k, v in expected.items() if not np.array_equal(found[k], v)]
        losses = ranks[0]["losses"]
        assert sorted(losses) == list(range(STOP + 1, STEPS + 1))
        assert all(abs(losses[s] - straight["losses"][s]) < 1e-9 for s in losses)


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny_config(corpus, tmp_path_factory.mktemp("straight"), **SETTINGS)
    return run_distributed(train_tiny, 1, config)[0]


@pytest.mark.parametrize("world", [2, 3])
def test_same_ranks_resume_bit_exactly(world: int, corpus: Path, tmp_path: Path) -> None:
    """In bf16, with dropout: losses and every piece of every rank."""
    changes = SETTINGS | BACKENDS["fsdp2"] | {"train__precision": "bf16", "model__dropout": 0.1}
    changes |= {"train__micro_batch_size": 2}
    whole = run_distributed(train_tiny, world, tiny_config(corpus, tmp_path / "a", **changes))
    broken = tiny_config(corpus, tmp_path / "b", **changes)
    first = run_distributed(train_tiny, world, broken, STOP)
    second = run_distributed(train_tiny, world, broken)
    assert first[0]["step"] == STOP
    assert first[0]["losses"] | second[0]["losses"] == whole[0]["losses"]
    for found, expected in zip(second, whole, strict=True):
        tensors = expected["tensors"]
        assert found["tensors"].keys() == tensors.keys()
        assert not [k for k, v in tensors.items() if not np.array_equal(found["tensors"][k], v)]
