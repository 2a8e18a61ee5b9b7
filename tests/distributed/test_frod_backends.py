"""FRoD on every backend against one process: the same basis, losses, weights and moments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import BF16, DOUBLE, OFFLOADED

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import Distance, distance
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS, BATCH = 6, 48
SETTINGS: dict[str, Any] = {
    "spectral__method": "frod",
    # All but fc2, whose short stack has a null space, where any basis is as good as another.
    "spectral__targets": "[q_proj,k_proj,v_proj,out_proj,fc1]",
    "spectral__train_dense": False,
    "spectral__sparsity": 0.05,
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "train__eval_interval": 100,
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full steps
    "optimizer__warmup_steps": 1,
}
TRAINS_ALL = {"spectral__train_dense": True, "spectral__targets": "[]"}
CLIPPED = {"optimizer__clip_grad_norm": 0.01}

Alone = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def alone(train_alone: Alone) -> Alone:
    """One process's result for a set of changes."""
    settings = SETTINGS | {"train__micro_batch_size": BATCH}
    return lambda changes: train_alone(settings | changes)


def several(corpus: Path, run_dir: Path, world: int, accumulation: int, changes: Any) -> Any:
    micro = {"train__micro_batch_size": BATCH // (world * accumulation)}
    config = tiny_config(corpus, run_dir, **(SETTINGS | micro | changes))
    return run_distributed(train_tiny, world, config, timeout_seconds=120)


def bases(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {k: v for k, v in ranks[0]["tensors"].items() if k.startswith("frod/")}


def require_equal(ranks: Any, expected: dict[str, Any], *, loss: float, rest: float) -> Distance:
    for name, value in bases([expected]).items():
        np.testing.assert_array_equal(bases(ranks)[name], value, err_msg=name)
    found = distance(ranks, expected)
    assert found.loss < loss, found
    assert max(found.weights, found.factors, found.moments) < rest, found
    assert found.steps_equal
    return found


@pytest.mark.parametrize(
    ("world", "accumulation", "changes"), [(2, 2, CLIPPED), (4, 2, TRAINS_ALL)], ids=str
)
def test_ddp_equals_one_process(
    world: int, accumulation: int, changes: Any, corpus: Path, tmp_path: Path, alone: Alone
) -> None:
    changes = changes | DOUBLE
    ranks = several(corpus, tmp_path, world, accumulation, changes)
    require_equal(ranks, alone(changes), loss=1e-12, rest=1e-9)


@pytest.mark.parametrize(
    ("world", "accumulation", "changes"),
    [
        (3, 2, CLIPPED),
        (4, 1, CLIPPED | {"parallel__shard_group": 2, "parallel__residual": "replicated"}),
        (2, 2, TRAINS_ALL),
    ],
    ids=str,
)
def test_fsdp2_equals_one_process(
    world: int, accumulation: int, changes: Any, corpus: Path, tmp_path: Path, alone: Alone
) -> None:
    changes = changes | DOUBLE | {"parallel__backend": "fsdp2"}
    ranks = several(corpus, tmp_path, world, accumulation, changes)
    require_equal(ranks, alone(changes), loss=1e-12, rest=1e-9)


@pytest.mark.parametrize(
    ("stage", "world", "accumulation", "changes"),
    [
        (0, 2, 1, CLIPPED),
        (1, 2, 2, CLIPPED),
        (2, 2, 2, TRAINS_ALL),
        (2, 3, 1, OFFLOADED),
        (3, 3, 2, CLIPPED),
        (3, 2, 1, OFFLOADED | TRAINS_ALL),
    ],
    ids=str,
)
def test_zero_equals_one_process(
    stage: int,
    world: int,
    accumulation: int,
    changes: Any,
    corpus: Path,
    tmp_path: Path,
    alone: Alone,
) -> None:
    changes = changes | {"parallel__backend": "deepspeed", "parallel__zero_stage": stage}
    alone_changes = {k: v for k, v in changes.items() if not k.startswith("parallel__")}
    ranks = several(corpus, tmp_path, world, accumulation, changes)
    require_equal(ranks, alone(alone_changes), loss=1e-5, rest=1e-3)


def one_owner_leaves_out_a_matrix(config: Any) -> dict[str, Any]:
    """Rank 1 does not add its share to the sums."""
    from spectral_scale.methods.frod import controller as frod_controller

    plain = frod_controller.joint_basis

    def broken(weights: Any, *arguments: Any, **keywords: Any) -> Any:
        import torch.distributed as dist

        return plain([] if dist.get_rank() else weights, *arguments, **keywords)

    frod_controller.joint_basis = broken
    return train_tiny(config)


def test_a_share_that_is_left_out_would_show(corpus: Path, tmp_path: Path, alone: Alone) -> None:
    micro = {"train__micro_batch_size": BATCH // 2}
    config = tiny_config(corpus, tmp_path, **(SETTINGS | micro | DOUBLE))
    ranks = run_distributed(one_owner_leaves_out_a_matrix, 2, config)
    with pytest.raises(AssertionError):
        require_equal(ranks, alone(DOUBLE), loss=1e-12, rest=1e-9)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, BF16),
        (2, {"parallel__backend": "fsdp2"}),
        (2, {"parallel__backend": "deepspeed", "parallel__zero_stage": 3} | BF16),
    ],
    ids=str,
)
def test_resume_is_bit_exact(world: int, changes: Any, corpus: Path, tmp_path: Path) -> None:
    """Frozen weights come from where the run began, bases and coefficients from the checkpoint.

    ZeRO-3 leaves frozen weights whole or cut, as the last pass had them; there losses show them.
    """
    micro = {"train__micro_batch_size": BATCH // world}
    settings = SETTINGS | TRAINS_ALL | micro | changes
    whole = tiny_config(corpus, tmp_path / "whole", **settings)
    parts = tiny_config(corpus, tmp_path / "parts", **settings)
    expected = run_distributed(train_tiny, world, whole, timeout_seconds=120)
    stopped = run_distributed(train_tiny, world, parts, 3, timeout_seconds=120)
    assert stopped[0]["step"] == 3
    resumed = run_distributed(train_tiny, world, parts, timeout_seconds=120)
    for found, reference in zip(resumed, expected, strict=True):
        assert found["tensors"].keys() == reference["tensors"].keys()
        for name, value in reference["tensors"].items():
            if not (name.startswith("frozen/") and changes.get("parallel__zero_stage") == 3):
                np.testing.assert_array_equal(found["tensors"][name], value, err_msg=name)
    losses = expected[0]["losses"]
    assert resumed[0]["losses"] == {s: losses[s] for s in losses if s > 3}
