"""Singular values clamped to zero: factors stay equal over world sizes across a re-SVD."""

from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_tiny

SETTINGS: dict[str, Any] = {
    "train__steps": 14,  # re-SVD after 8
    "train__global_batch_size": 12,
    "train__precision": "fp64",
    "optimizer__spectral_lr": 1e-2,  # so high that some values reach zero
}


def leave_the_null_space_to_rounding(config: Any) -> dict[str, Any]:
    from spectral_scale.ops import decomposition

    decomposition.fix_null_space = lambda *factors: factors
    return train_tiny(config)


@pytest.mark.parametrize("settled", [True, False])
def test_zeros_leave_nothing_to_rounding(settled: bool, corpus: Path, tmp_path: Path) -> None:
    train = train_tiny if settled else leave_the_null_space_to_rounding
    one = tiny_config(corpus, tmp_path / "one", train__micro_batch_size=12, **SETTINGS)
    two = tiny_config(corpus, tmp_path / "two", train__micro_batch_size=3, **SETTINGS)
    alone = run_distributed(train, 1, one)[0]
    found = distance(run_distributed(train, 2, two), alone)
    sigma = {k: v for k, v in alone["tensors"].items() if k.endswith("/sigma")}
    assert any((values < 1e-12).any() for values in sigma.values())
    assert (found.factors < 1e-9 and found.weights < 1e-9) is settled
    assert found.loss < 1e-4
