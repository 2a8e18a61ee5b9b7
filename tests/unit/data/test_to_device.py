"""Batches on their way to the device."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from spectral_scale.data.loader import Batch
from spectral_scale.data.to_device import BatchMover
from spectral_scale.testing.fake_cuda import missing, on_fake_cuda


def test_on_the_cpu_nothing_is_copied() -> None:
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    (moved,) = BatchMover(torch.device("cpu")).move([batch])
    assert moved.input_ids is batch.input_ids and moved.labels is batch.labels


def moved_to_gpu() -> dict[str, Any]:
    """The order of what is asked of streams, and of where the batch lies."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "copies"

        def wait_stream(self, other: Any) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Inside:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            calls.append(f"in {self.stream.name}")

        def __exit__(self, *_: Any) -> None:
            calls.append("out")

    cuda: Any = torch.cuda
    cuda.Stream, cuda.stream = Stream, Inside
    cuda.current_stream = lambda *_: Stream("computing")
    recorded: list[str] = []
    to = torch.Tensor.to

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        calls.append("pin")
        return self

    def moved(self: torch.Tensor, *arguments: Any, **keys: Any) -> torch.Tensor:
        calls.append(f"copy {keys}")
        return to(self, *arguments, **keys)

    fake: Any = FakeTensor
    fake.pin_memory, fake.to = pin_memory, moved
    fake.record_stream = lambda self, stream: recorded.append(stream.name)
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
    (found,) = BatchMover(torch.device("cuda", 0)).move([batch])
    return {"calls": calls, "recorded": recorded, "devices": [str(t.device) for t in found]}


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_gpu_copies_pinned_memory_beside_its_work() -> None:
    found = on_fake_cuda(moved_to_gpu)
    copy = ["pin", "copy {'non_blocking': True}"]
    assert found["calls"] == ["in copies", *copy, *copy, "out", "computing waits for copies"]
    assert found["recorded"] == ["computing"] * 2
    assert found["devices"] == ["cuda:0"] * 2
