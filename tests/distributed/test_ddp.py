"""DistributedDataParallel against one process: same losses, same triplets, across swaps."""

from pathlib import Path

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS = 20  # swaps at 4, 8 (re-SVD), 12, 16 (re-SVD), 20


SMALLEST = pytest.param(2, 1, marks=pytest.mark.fast)
OTHERS = [(2, 2), (2, 4), (3, 1), (3, 2), (3, 4)]


@pytest.mark.parametrize(("world_size", "accumulation"), [SMALLEST, *OTHERS])
def test_ddp_equals_one_process(
    corpus: Path, tmp_path: Path, world_size: int, accumulation: int
) -> None:
    """Losses within 1e-5, identical index sets, over five swaps and two re-SVDs."""
    batch = 2 * world_size * accumulation
    changes = {"train__steps": STEPS, "train__global_batch_size": batch}
    micro = batch // (world_size * accumulation)
    config = tiny_config(corpus, tmp_path / "many", train__micro_batch_size=micro, **changes)
    alone = tiny_config(corpus, tmp_path / "one", train__micro_batch_size=batch, **changes)
    many = run_distributed(train_tiny, world_size, config)
    one = run_distributed(train_tiny, 1, alone)[0]

    losses, expected = many[0]["losses"], one["losses"]
    assert losses.keys() == expected.keys() == set(range(1, STEPS + 1))
    assert max(abs(losses[s] - expected[s]) for s in losses) < 1e-5

    bank = {k: v for rank in many for k, v in rank["tensors"].items() if k.startswith("bank/")}
    reference = {k: v for k, v in one["tensors"].items() if k.startswith("bank/")}
    assert bank.keys() == reference.keys()
    for name, value in reference.items():
        if name.endswith("/active"):
            np.testing.assert_array_equal(bank[name], value)

    for rank in many[1:]:  # replicas are bit-identical
        for name, value in rank["tensors"].items():
            if name.startswith("frozen/"):
                np.testing.assert_array_equal(value, many[0]["tensors"][name])


def test_every_matrix_has_one_owner(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path, train__steps=4)
    many = run_distributed(train_tiny, 3, config)
    owned = [{k for k in rank["tensors"] if k.startswith("bank/")} for rank in many]
    assert all(owned)
    assert sum(len(keys) for keys in owned) == len(set().union(*owned)) == 12 * 4
