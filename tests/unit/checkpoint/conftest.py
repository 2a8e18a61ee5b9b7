"""Ranks as threads that share a folder, checkpoints whose content follows from their step."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.parallel.chunks import TensorChunk, whole
from spectral_scale.parallel.collective import SingleProcess


class ThreadCollective:
    """One rank of a group of threads; values travel as JSON, as they do between processes."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world_size = len(slots)
        self._slots = slots
        self._barrier = barrier

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = json.dumps(value)
        self._barrier.wait()
        values = [json.loads(text) for text in self._slots]
        self._barrier.wait()
        return values

    def barrier(self) -> None:
        self._barrier.wait()

    def gather_json(self, value: Any) -> list[Any] | None:
        values = self._exchange(value)
        return values if self.rank == 0 else None

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        return self._exchange(value)[source]

    def agree(self, error: str | None, *, what: str) -> str | None:
        for rank, text in enumerate(self._exchange(error)):
            if text is not None:
                return f"rank {rank}: {what}: {text}"
        return None


def _run_ranks(world_size: int, action: Callable[[Any], Any]) -> list[Any]:
    """Results by rank; an exception of a rank stands in its place. A hang breaks the barrier."""
    barrier = threading.Barrier(world_size, timeout=30)
    slots: list[Any] = [None] * world_size
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = action(ThreadCollective(rank, slots, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _content(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model/w": torch.randn(37, 5, generator=generator),
        "bank/u": torch.randn(64, generator=generator).bfloat16(),
        "rng": torch.randint(0, 2**62, (3,), generator=generator),
        "scale": torch.randn((), generator=generator),
    }


class Run:
    """A checkpoints folder and what a step's checkpoint must hold."""

    content = staticmethod(_content)

    def __init__(self, root: Path) -> None:
        self.root = root

    def manager(self, keep_last: int = 3, **options: Any) -> CheckpointManager:
        """A fresh manager, as a fresh process has it."""
        return CheckpointManager(self.root, keep_last, SingleProcess(), **options)

    def chunks(self, step: int) -> list[TensorChunk]:
        return [whole(name, tensor) for name, tensor in _content(step).items()]

    def save(self, step: int, manager: CheckpointManager | None = None) -> Path:
        manager = manager or self.manager()
        return manager.save(
            step, self.chunks(step), state={"step": step}, identity={"model": "tiny"}
        )

    def check(self, reader: CheckpointReader | None) -> int:
        """Assert that a checkpoint is bit for bit what its step says; returns the step."""
        assert reader is not None
        for name, tensor in _content(reader.step).items():
            assert torch.equal(reader.read(name), tensor), (reader.path, name)
        assert reader.state == {"step": reader.step}
        assert reader.identity == {"model": "tiny"}
        return reader.step

    def names(self) -> list[str]:
        """Everything in the folder, hidden names too."""
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def checkpoints(tmp_path: Path) -> Run:
    return Run(tmp_path / "run" / "checkpoints")


@pytest.fixture
def run_ranks() -> Callable[[int, Callable[[Any], Any]], list[Any]]:
    return _run_ranks
