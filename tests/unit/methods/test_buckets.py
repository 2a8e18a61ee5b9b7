"""Parcels: which matrices travel together, and how much memory a delivery takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spectral_scale import SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.methods import buckets as buckets
from spectral_scale.methods.buckets import plan_rounds, scattered_bytes
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.testing.memory import PeakMemory


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 100)), min_size=1, max_size=40),
    st.integers(1, 200),
)
def test_every_matrix_travels_once_with_its_owner(matrices, limit):
    owners = {str(i): owner for i, (owner, _) in enumerate(matrices)}
    sizes = {str(i): size for i, (_, size) in enumerate(matrices)}
    rounds = plan_rounds(owners, sizes, limit)
    sent = [name for buckets in rounds for bucket in buckets for name in bucket.names]
    assert sorted(sent) == sorted(owners)
    for round_ in rounds:
        assert len({bucket.owner for bucket in round_}) == len(round_)
        for bucket in round_:
            assert {owners[name] for name in bucket.names} == {bucket.owner}
            assert len(bucket.names) == 1 or sum(sizes[n] for n in bucket.names) <= limit
    for owner in set(owners.values()):  # the next matrix would not have fitted
        mine = [bucket.names for round_ in rounds for bucket in round_ if bucket.owner == owner]
        for names, following in zip(mine, mine[1:], strict=False):
            assert sum(sizes[n] for n in (*names, following[0])) > limit


def test_one_round_when_all_fits():
    owners = {"a": 0, "b": 1, "c": 0}
    (only,) = plan_rounds(owners, {"a": 3, "b": 9, "c": 4})
    assert [(bucket.owner, bucket.names) for bucket in only] == [(0, ("a", "c")), (1, ("b",))]


@pytest.mark.parametrize("storage", ["residual", "factored"])
def test_bytes_are_those_of_the_parameters(storage):
    layer = SpectralLinear(
        12, 20, 3, storage=storage, bias=False, frozen_dtype=torch.bfloat16, dtype=torch.float32
    )
    assert scattered_bytes(layer) == sum(p.nbytes for p in layer.parameters())


@pytest.mark.parametrize("bounded", [True, False])
def test_a_delivery_takes_the_memory_of_a_bucket(bounded, monkeypatch):
    """Twenty matrices, a bucket of two: the twin builds all of them at once."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    config = SpectralConfig(spectral_rank=4, steps_per_iteration=1)
    convert(model, config, targets=["*"])
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, spectral_lr=1e-3))
    controller = SpectralController(model, optimizer, config)
    matrix = scattered_bytes(controller.layers["0"])
    if bounded:
        monkeypatch.setattr(buckets, "BUCKET_BYTES", 2 * matrix)
    with PeakMemory() as memory:
        controller.swap.scatter(trained=True)
    assert (memory.peak_bytes < 6 * matrix) is bounded
    assert memory.current_bytes == 0
