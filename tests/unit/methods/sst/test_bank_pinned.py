"""A bank in host memory pins each matrix's pages once, and uses them in every round."""

from typing import Any

import pytest
import torch

from spectral_scale.methods.sst import bank as module
from spectral_scale.methods.sst.bank import SpectralBank

CPU = torch.device("cpu")


class Memory:
    """Stands for torch in the bank's module: counts what is pinned, without a GPU to pin for."""

    def __init__(self) -> None:
        self.pinned: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: Any, *, pin_memory: bool = False, **settings: Any) -> torch.Tensor:
        if pin_memory:
            self.pinned.append(tuple(shape))
        return torch.empty(shape, **settings)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    monkeypatch.setattr(module, "torch", found)
    return found


def offloaded_bank() -> SpectralBank:
    """As on a GPU's rank with `bank_device: cpu`, but it computes here."""
    bank = SpectralBank(device=CPU, compute_device=torch.device("cuda", 0), dtype=torch.float32)
    bank.compute_device = CPU
    return bank


def filled(bank: SpectralBank) -> SpectralBank:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    bank.decompose("a", weight)
    return bank


def test_rounds_reuse_the_first_pages(memory: Memory) -> None:
    bank = filled(offloaded_bank())
    assert memory.pinned == [(6, 4), (4,), (4, 4)]
    first = bank["a"].u, bank["a"].sigma, bank["a"].v
    values = [t.clone() for t in first]
    for _ in range(3):
        bank.redecompose("a")
    assert len(memory.pinned) == 3
    entry = bank["a"]
    assert [t.data_ptr() for t in (entry.u, entry.sigma, entry.v)] == [t.data_ptr() for t in first]
    for found, expected in zip((entry.u, entry.sigma, entry.v), values, strict=True):
        torch.testing.assert_close(found, expected)


def test_values_are_those_of_a_bank_beside_the_model(memory: Memory) -> None:
    plain = filled(SpectralBank(device=CPU, compute_device=CPU, dtype=torch.float32))
    assert not memory.pinned
    bank = filled(offloaded_bank())
    for both in (plain, bank):
        both["a"].active = torch.tensor([0, 2])
        both["a"].sigma[1] *= 3
        both.redecompose("a")
        both["a"].active = torch.tensor([1])
    assert torch.equal(plain["a"].u, bank["a"].u) and torch.equal(plain["a"].v, bank["a"].v)
    one, other = (b.frozen_values("a", factored=False)["residual"] for b in (plain, bank))
    assert torch.equal(one, other)


def test_a_matrix_that_fails_keeps_its_factors(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written into the pages before the new factors are there."""

    def fails(weight: torch.Tensor) -> Any:
        raise torch.linalg.LinAlgError("no driver")

    bank = filled(offloaded_bank())
    before = bank["a"].u.clone()
    monkeypatch.setattr(module, "svd", fails)
    with pytest.raises(torch.linalg.LinAlgError):
        bank.redecompose("a")
    assert torch.equal(bank["a"].u, before)
