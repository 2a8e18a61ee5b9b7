"""The store of plain torch parameters: what it says of itself, and its state in and out."""

import pytest
import torch
from torch import nn

from spectral_scale.backends.deepspeed.store import ZeroStore
from spectral_scale.backends.fsdp2.store import FSDP2Store
from spectral_scale.backends.state import load_state, replicated, state_chunks
from spectral_scale.errors import CheckpointError, SpectralError
from spectral_scale.optim.build import create_state
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.store import TorchStore


def stepped(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer, TorchStore]:
    """A frozen and a trained layer, of which an optimizer has taken steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    create_state(optimizer)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, TorchStore(model, optimizer, SingleProcess())


def test_a_store_retracts_or_says_that_the_step_did() -> None:
    model, _, store = stepped()
    assert not TorchStore.retracts_in_step and not FSDP2Store.retracts_in_step
    assert ZeroStore.retracts_in_step
    store.retract_columns(["1.weight"])
    torch.testing.assert_close(model[1].weight.norm(dim=0), torch.ones(4))
    with pytest.raises(SpectralError, match="no optimizer step retracts behind TorchStore"):
        store.require_retracted(["1.weight"])
    silent = ZeroStore.__new__(ZeroStore)
    with pytest.raises(SpectralError, match="each optimizer step retracts directions itself"):
        silent.retract_columns(["1.weight"])


def test_state_goes_out_and_comes_in_bit_for_bit() -> None:
    _, _, store = stepped()
    saved = {chunk.key: chunk.tensor.clone() for chunk in state_chunks(store)}
    keys = ("exp_avg", "exp_avg_sq", "step")
    assert saved.keys() == {
        name
        for fqn in ("1.weight", "1.bias")
        for name in (f"model/{fqn}", *(f"optimizer/{fqn}/{key}" for key in keys))
    }
    assert saved["optimizer/1.weight/step"] == 2
    model, optimizer, other = stepped(steps=5)
    load_state(other, lambda name: saved[name])
    assert torch.equal(model[1].weight, saved["model/1.weight"])
    state = optimizer.state[model[1].weight]
    assert all(torch.equal(state[key], saved[f"optimizer/1.weight/{key}"]) for key in keys)
    held = {name for name, _, _ in replicated(other)}
    assert held == {"model/0.weight", "model/0.bias"} | {n for n in saved if "exp_avg" not in n}


def test_a_tensor_of_another_shape_is_refused() -> None:
    _, _, store = stepped()
    saved = {chunk.key: chunk.tensor.clone() for chunk in state_chunks(store)}
    saved["model/1.weight"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError, match=r"model/1.weight has shape \(3, 4\)"):
        load_state(store, lambda name: saved[name])
