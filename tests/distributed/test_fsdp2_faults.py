"""Each way of doing FSDP2 wrong, and each failure inside a swap, is seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import RankError, run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_tiny

SETTINGS: dict[str, Any] = {
    "train__steps": 7,  # a swap after 4
    "train__global_batch_size": 12,
    "train__micro_batch_size": 3,
    "train__precision": "fp64",
    "optimizer__spectral_lr": 1e-4,
    "optimizer__clip_grad_norm": 0.1,
}


def keep_step_counts() -> None:
    from spectral_scale.backends.fsdp2.store import FSDP2Store

    reset = FSDP2Store.reset_moments

    def faulty(store: Any, fqns: Any) -> int:
        states = [store._optimizer.state[store._parameters[f]] for f in fqns]
        steps = [s["step"].clone() for s in states]
        count = reset(store, fqns)
        for state, step in zip(states, steps, strict=True):
            state["step"].copy_(step)
        return count

    FSDP2Store.reset_moments = faulty  # type: ignore[method-assign]


def keep_moments() -> None:
    from spectral_scale.backends.fsdp2.store import FSDP2Store

    def faulty(store: Any, fqns: Any) -> int:
        return sum(2 * store._parameters[f].numel() for f in fqns)

    FSDP2Store.reset_moments = faulty  # type: ignore[method-assign]


def norm_columns_by_piece() -> None:
    from spectral_scale.backends.fsdp2 import store as fsdp2_store

    fsdp2_store.sum_over_shards = lambda values, layouts: list(values)


def clip_by_piece() -> None:
    from spectral_scale.backends.fsdp2 import backend as fsdp2

    fsdp2.sum_over_shards = lambda values, layouts: list(values)


def average_gradients() -> None:
    from torch.distributed.fsdp import FSDPModule

    divide = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda module, _: divide(module, 2.0)


def draw_on_every_rank() -> None:
    """Rank 1 takes other triplets than the owner sent it."""
    import torch.distributed as dist

    from spectral_scale.backends.fsdp2 import store as fsdp2_store
    from spectral_scale.parallel.dtensor_collectives import local, scatter

    def faulty(values: Any, into: Any, layout: Any, *, owner: int) -> None:
        scatter(values, into, layout, owner=owner)
        if dist.get_rank() == 1:
            for tensor in into:
                local(tensor).copy_(local(tensor).roll(1, -1))

    fsdp2_store.scatter = faulty


def forget_frozen_weights() -> None:
    """A swap writes what trains, and leaves the frozen rest as it was."""
    from spectral_scale.backends.fsdp2.store import FSDP2Store

    scatter = FSDP2Store.scatter
    calls = {"first": 2}  # a bucket of each owner

    def faulty(store: Any, values: Any, *, owner: int) -> None:
        calls["first"] -= 1
        kept = {k: v for k, v in values.items() if calls["first"] >= 0 or "residual" not in k}
        scatter(store, kept, owner=owner)

    FSDP2Store.scatter = faulty  # type: ignore[method-assign]


FAULTS: list[Callable[[], None]] = [
    keep_step_counts,
    keep_moments,
    norm_columns_by_piece,
    clip_by_piece,
    average_gradients,
    draw_on_every_rank,
    forget_frozen_weights,
]


def train_with(config: Any, fault: Callable[[], None]) -> dict[str, Any]:
    fault()
    return train_tiny(config)


def nothing() -> None:
    """No fault."""


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny_config(corpus, tmp_path_factory.mktemp("alone"), **SETTINGS)
    return run_distributed(train_tiny, 1, config)[0]


@pytest.mark.parametrize("fault", [nothing, *FAULTS], ids=lambda f: f.__name__)
def test_fault_is_seen(
    fault: Callable[[], None], corpus: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    config = tiny_config(corpus, tmp_path, parallel__backend="fsdp2", **SETTINGS)
    try:
        ranks = run_distributed(train_with, 2, config, fault)
    except RankError as error:  # the swap's own proof found it
        assert fault is draw_on_every_rank
        assert "the store does not write where the model reads" in str(error)
        return
    found = distance(ranks, alone)
    equal = max(found.loss, found.weights, found.factors, found.moments) < 1e-9
    assert (equal and found.steps_equal) is (fault is nothing)


def fail_in_swap(config: Any, kind: str) -> str:
    """Break one matrix at the re-SVD on its owner; what this rank raises."""
    import torch

    from spectral_scale.errors import SpectralError
    from spectral_scale.methods.sst.bank import SpectralBank

    redecompose = SpectralBank.redecompose

    def broken(bank: SpectralBank, name: str) -> None:
        if name.endswith("layers.1.fc1"):
            if kind == "error":
                raise ValueError("injected")
            bank[name].u.fill_(torch.nan)
        redecompose(bank, name)

    SpectralBank.redecompose = broken  # type: ignore[method-assign]
    try:
        train_tiny(config)
    except SpectralError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("kind", ["nan", "error"])
def test_failed_decomposition_reaches_every_rank(kind: str, corpus: Path, tmp_path: Path) -> None:
    changes = SETTINGS | {"train__steps": 9, "train__micro_batch_size": 2}
    config = tiny_config(corpus, tmp_path, parallel__backend="fsdp2", **changes)
    messages = run_distributed(fail_in_swap, 3, config, kind)
    assert len(set(messages)) == 1
    assert "model.decoder.layers.1.fc1" in messages[0]
    assert messages[0].startswith("rank ")
