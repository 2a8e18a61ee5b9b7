"""Measures of memory, time and spectrum against values known by hand."""

import math

import pytest
import torch

from spectral_scale.metrics.measures import (
    StepTimer,
    effective_rank,
    orthogonality_error,
    peak_memory_bytes,
    tensor_bytes,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_effective_rank_of_equal_values_is_their_number(dtype):
    assert effective_rank(torch.ones(12, dtype=dtype)) == pytest.approx(12.0, abs=1e-9)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0], dtype=dtype)) == pytest.approx(1.0)


def test_effective_rank_by_hand_and_scale_free():
    sigma = torch.tensor([0.5, 0.25, 0.25])
    expected = math.exp(0.5 * math.log(2) + 0.5 * math.log(4))
    assert effective_rank(sigma) == pytest.approx(expected)
    assert effective_rank(sigma.double() * 1e306) == pytest.approx(expected)


def test_effective_rank_edges():
    assert effective_rank(torch.zeros(4)) == 0.0
    assert effective_rank(torch.empty(0)) == 0.0
    assert math.isnan(effective_rank(torch.tensor([1.0, math.nan])))
    assert math.isnan(effective_rank(torch.tensor([1.0, math.inf])))
    with pytest.raises(ValueError, match="negative"):
        effective_rank(torch.tensor([1.0, -0.1]))
    with pytest.raises(ValueError, match="required"):
        effective_rank(torch.ones(2, 2))


def test_orthogonality_error_sees_length_and_angle():
    u = torch.linalg.qr(torch.randn(40, 7, dtype=torch.float64)).Q
    assert orthogonality_error(u) < 1e-14
    assert orthogonality_error(u.float()) < 1e-6
    longer = u.clone()
    longer[:, 3] *= 1.01
    assert orthogonality_error(longer) == pytest.approx(1.01**2 - 1)
    skewed = u.clone()
    skewed[:, 0] = (u[:, 0] + 0.1 * u[:, 1]) / math.sqrt(1.01)
    assert orthogonality_error(skewed) == pytest.approx(0.1 / math.sqrt(1.01))


def test_orthogonality_error_edges():
    assert orthogonality_error(torch.empty(5, 0)) == 0.0
    assert math.isnan(orthogonality_error(torch.full((3, 2), math.nan)))
    with pytest.raises(ValueError, match="required"):
        orthogonality_error(torch.ones(3))


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


def test_tensor_bytes_counts_the_local_part_of_a_distributed_tensor():
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
