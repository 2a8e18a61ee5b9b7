"""FSDP2 and HSDP against one process: losses, triplets, weights, moments, across swaps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_settings import CLIPPED, FACTORED, RECOMPUTED, UNCLIPPED

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS = 10  # swaps after 4 and 8, the second with a re-SVD
BATCH = 48
SETTINGS: dict[str, Any] = {
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    # Above rounding, which Adam would blow up to full steps.
    "optimizer__eps": 1e-5,
    # So low that sigma stays above zero: two zeros leave the basis of a re-SVD to rounding.
    "optimizer__spectral_lr": 1e-4,
}
REPLICATED = {"parallel__residual": "replicated"}
HSDP = {"parallel__shard_group": 2}

Alone = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def alone(train_alone: Alone) -> Alone:
    """One process's result for a set of changes."""
    settings = SETTINGS | {"train__micro_batch_size": BATCH // 2}
    return lambda changes: train_alone(settings | changes)


def fsdp2_config(corpus: Path, run_dir: Path, world: int, accumulation: int, **changes: Any) -> Any:
    micro = BATCH // (world * accumulation)
    settings = {"parallel__backend": "fsdp2", "train__micro_batch_size": micro}
    return tiny_config(corpus, run_dir, **(SETTINGS | settings | changes))


DOUBLE = [
    (1, 4, CLIPPED),
    (2, 1, UNCLIPPED | FACTORED),
    (2, 4, CLIPPED | REPLICATED),
    (3, 1, UNCLIPPED),
    (3, 4, CLIPPED | FACTORED),
    (4, 1, UNCLIPPED),
    (4, 4, CLIPPED | HSDP),
    (4, 1, UNCLIPPED | HSDP | FACTORED | REPLICATED),
]
SINGLE = [
    pytest.param(2, 4, UNCLIPPED, marks=pytest.mark.fast),
    (3, 4, CLIPPED),
    (4, 4, CLIPPED | HSDP),
]


@pytest.mark.parametrize(("world", "accumulation", "changes"), DOUBLE, ids=str)
def test_equals_one_process(
    world: int,
    accumulation: int,
    changes: dict[str, Any],
    corpus: Path,
    tmp_path: Path,
    alone: Alone,
) -> None:
    """In double precision every tensor, moments and step counts included, is the same."""
    changes = changes | {"train__precision": "fp64"}
    config = fsdp2_config(corpus, tmp_path, world, accumulation, **changes)
    found = distance(run_distributed(train_tiny, world, config), alone(changes))
    assert found.loss < 1e-12
    assert max(found.weights, found.factors, found.moments) < 1e-9
    assert found.steps_equal
    assert found.indices_equal


@pytest.mark.parametrize(("world", "accumulation", "changes"), SINGLE, ids=str)
def test_losses_equal_in_single_precision(
    world: int,
    accumulation: int,
    changes: dict[str, Any],
    corpus: Path,
    tmp_path: Path,
    alone: Alone,
) -> None:
    """Rounding moves losses by less than 1e-5 and draws the same triplets."""
    config = fsdp2_config(corpus, tmp_path, world, accumulation, **changes)
    found = distance(run_distributed(train_tiny, world, config), alone(changes))
    assert found.loss < 1e-5
    assert found.weights < 1e-4  # where a gradient is near eps, Adam blows rounding up
    assert found.steps_equal
    assert found.indices_equal


WIDTH = {"spectral__direction_lr_scaling": "width", "optimizer__weight_decay": 0.1}


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"spectral__method": "full"}),
        (2, {"spectral__method": "relora"}),
        (3, {"spectral__method": "lora"} | HSDP | {"parallel__shard_group": 1}),
        (2, {"model__name": "llama-60m"} | RECOMPUTED | WIDTH),
        (3, {"spectral__extra_sigma": 5, "spectral__boundary_moments": "keep_redrawn"}),
    ],
    ids=str,
)
def test_methods_and_models_equal_one_process(
    world: int, changes: dict[str, Any], corpus: Path, tmp_path: Path, alone: Alone
) -> None:
    changes = changes | {"train__precision": "fp64"}
    config = fsdp2_config(corpus, tmp_path, world, 2, **changes)
    found = distance(run_distributed(train_tiny, world, config), alone(changes))
    assert max(found.loss, found.weights, found.factors, found.moments) < 1e-9
    assert found.steps_equal
    assert found.indices_equal


def test_bf16_trains_the_numbers_of_plain_torch(corpus: Path, tmp_path: Path) -> None:
    """One rank, the same products under autocast: the same bits, swaps included."""
    changes = SETTINGS | {"train__precision": "bf16", "train__micro_batch_size": BATCH // 2}
    sharded = {"parallel__backend": "fsdp2"} | changes
    found = run_distributed(train_tiny, 1, tiny_config(corpus, tmp_path / "a", **sharded))[0]
    expected = run_distributed(train_tiny, 1, tiny_config(corpus, tmp_path / "b", **changes))[0]
    assert found["losses"] == expected["losses"]
    many = fsdp2_config(corpus, tmp_path / "c", 2, 1, train__precision="bf16")
    losses = run_distributed(train_tiny, 2, many)[0]["losses"]
    assert max(abs(losses[s] - expected["losses"][s]) for s in losses) < 1e-3


def test_nothing_frozen_is_left_at_full_rank(corpus: Path, tmp_path: Path) -> None:
    """All triplets train: the frozen factors have no columns, and nothing is sent for them."""
    changes = {"spectral__storage": "factored", "spectral__spectral_rank": 32}
    changes |= {"train__precision": "bf16"}
    config = fsdp2_config(corpus, tmp_path, 2, 1, train__steps=5, **changes)
    losses = run_distributed(train_tiny, 2, config)[0]["losses"]
    assert losses[5] < losses[1]
