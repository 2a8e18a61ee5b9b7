"""The store of a model under fully_shard, on one rank: what is written is what the model uses."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spectral_scale.backends.fsdp2.store import FSDP2Store
from spectral_scale.optim.build import create_state
from spectral_scale.parallel.dtensor_collectives import local
from spectral_scale.parallel.group import join_alone


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    join_alone(torch.device("cpu"))
    yield
    dist.destroy_process_group()


def sharded_model() -> tuple[nn.Linear, torch.optim.AdamW]:
    """One linear layer that is the root, so that a forward leaves its weight whole."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    create_state(optimizer)
    return model, optimizer


def forward(model: nn.Linear) -> Tensor:
    with torch.no_grad():
        return model(torch.ones(1, 3))


@pytest.mark.parametrize("reshards", [True, False])
def test_writes_after_an_evaluation_are_used(
    reshards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin does not free the gathered weight first: what it writes is not seen."""
    model, optimizer = sharded_model()
    store = FSDP2Store(model, optimizer)
    forward(model)
    assert not isinstance(model.weight, DTensor)
    if not reshards:
        monkeypatch.setattr(store, "_reshard", lambda: None)
    store.scatter({"weight": torch.full((5, 3), 2.0)}, owner=0)
    assert torch.equal(forward(model), torch.full((1, 5), 6.0)) is reshards


def test_collect_gives_a_value_of_its_own() -> None:
    model, optimizer = sharded_model()
    store = FSDP2Store(model, optimizer)
    value = store.gather("weight", owner=0)
    assert value is not None
    assert value.shape == (5, 3)
    expected = value.clone()
    store.scatter({"weight": torch.zeros(5, 3)}, owner=0)
    assert torch.equal(value, expected)


def test_columns_become_unit_and_entries_nonnegative() -> None:
    model, optimizer = sharded_model()
    store = FSDP2Store(model, optimizer)
    store.scatter({"weight": torch.arange(-7.0, 8.0).view(5, 3)}, owner=0)
    store.retract_columns(["weight"])
    norms = torch.linalg.vector_norm(local(model.weight), dim=0)
    torch.testing.assert_close(norms, torch.ones(3))
    assert (local(model.weight) < 0).any()
    store.clamp_nonnegative(["weight"])
    assert not (local(model.weight) < 0).any()


def test_zero_columns_stay_finite() -> None:
    model, optimizer = sharded_model()
    store = FSDP2Store(model, optimizer)
    store.scatter({"weight": torch.zeros(5, 3)}, owner=0)
    store.retract_columns(["weight"])
    assert local(model.weight).isfinite().all()


def test_moments_are_zeroed_and_counted() -> None:
    model, optimizer = sharded_model()
    store = FSDP2Store(model, optimizer)
    forward_loss = model(torch.ones(2, 3)).sum()
    forward_loss.backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert state["step"] == 1
    assert store.reset_moments(["weight"]) == 2 * 15
    assert state["step"] == 0
    assert not local(state["exp_avg"]).any()
    assert not local(state["exp_avg_sq"]).any()


def test_moments_follow_their_columns() -> None:
    model, optimizer = sharded_model()
    store = FSDP2Store(model, optimizer)
    state = optimizer.state[model.weight]
    local(state["exp_avg"]).copy_(torch.arange(15.0).view(5, 3))
    state["step"].fill_(7)
    assert store.move_moments("weight", torch.tensor([2, -1, 0])) == 2 * 5
    moved = local(state["exp_avg"])
    assert moved[0].tolist() == [2.0, 0.0, 0.0]
    assert moved[1].tolist() == [5.0, 0.0, 3.0]
    assert state["step"] == 7


def test_a_value_of_another_shape_is_refused() -> None:
    model, optimizer = sharded_model()
    store = FSDP2Store(model, optimizer)
    with pytest.raises(ValueError, match=r"gave \(3, 5\) for a parameter of shape \(5, 3\)"):
        store.scatter({"weight": torch.zeros(3, 5)}, owner=0)
