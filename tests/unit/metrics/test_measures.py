"""Measures of memory and time against values known by hand."""

import pytest
import torch

from spectral_scale.metrics.measures import (
    StepTimer,
    peak_memory_bytes,
    tensor_bytes,
)


def test_tensor_bytes_counts_each_storage_once():
    flat = torch.zeros(100)
    views = [flat[:60].view(6, 10), flat[60:], flat]
    own = torch.zeros(3, dtype=torch.bfloat16)
    assert tensor_bytes([*views, own, None, own]) == 400 + 6
    assert tensor_bytes([flat[:1]]) == 400
    assert tensor_bytes([]) == 0


def test_tensor_bytes_of_meta_and_empty_tensors():
    on_meta = [torch.empty(10, device="meta"), torch.empty(20, device="meta")]
    assert tensor_bytes([*on_meta, on_meta[0].view(2, 5)]) == 120
    assert tensor_bytes([torch.empty(0), torch.empty(0)]) == 0


def test_tensor_bytes_of_a_generator_of_temporaries():
    # Were the temporaries freed while counting, the allocator would hand out one address again.
    assert tensor_bytes(torch.zeros(1000) for _ in range(20)) == 20 * 4000


def test_tensor_bytes_counts_the_local_shard_of_a_distributed_tensor():
    class Sharded:
        def to_local(self):
            return torch.zeros(5)

    assert tensor_bytes([Sharded()]) == 20


def test_peak_memory_of_this_process_is_plausible():
    peak = peak_memory_bytes(torch.device("cpu"))
    assert 50e6 < peak < 1e12
    ballast = torch.ones(40_000_000)
    assert peak_memory_bytes(torch.device("cpu")) >= ballast.nbytes


def test_step_timer_sums_by_name_and_starts_anew(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = StepTimer()
    with timer.phase("forward"):
        pass
    with timer.phase("backward"):
        pass
    with timer.phase("forward"):
        pass
    assert timer.take() == {"forward": 4.0, "backward": 2.0}
    assert timer.take() == {}


def test_step_timer_synchronizes_and_counts_a_phase_that_raises():
    calls = []
    timer = StepTimer(synchronize=lambda: calls.append(1))
    with pytest.raises(RuntimeError), timer.phase("forward"):
        raise RuntimeError
    assert len(calls) == 2 and list(timer.take()) == ["forward"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_cuda_device_is_that_of_its_tensors():
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ballast = torch.zeros(10_000_000, device=device)
    assert before + ballast.nbytes <= peak_memory_bytes(device) <= before + ballast.nbytes + 2**21
