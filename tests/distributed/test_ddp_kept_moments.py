"""Moments that follow their triplets, and extra singular values, under DistributedDataParallel."""

from pathlib import Path

import numpy as np

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny


def test_ranks_keep_the_same_moments(corpus: Path, tmp_path: Path) -> None:
    """Two ranks against one over two swaps and a re-SVD: losses and choices."""
    changes = {
        "spectral__boundary_moments": "keep_redrawn",
        "spectral__extra_sigma": 4,
        "train__steps": 13,
        "train__global_batch_size": 4,
    }
    two = tiny_config(corpus, tmp_path / "two", train__micro_batch_size=2, **changes)
    one = tiny_config(corpus, tmp_path / "one", train__micro_batch_size=4, **changes)
    first, second = run_distributed(train_tiny, 2, two)
    alone = run_distributed(train_tiny, 1, one)[0]

    # A rank that moved its moments differently would train other weights: 1e-4 without broadcast.
    assert max(abs(first["losses"][s] - loss) for s, loss in alone["losses"].items()) < 1e-5
    kept = [v["spectral/moments_kept"] for _, v in alone["lines"] if "spectral/moments_kept" in v]
    assert [count > 0 for count in kept] == [True, False, True]  # the second decomposes

    found = second["tensors"] | first["tensors"]
    chosen = [k for k in alone["tensors"] if k.endswith(("/active", "/extra"))]
    assert len(chosen) == 12 * 2
    for name in chosen:
        np.testing.assert_array_equal(found[name], alone["tensors"][name])
