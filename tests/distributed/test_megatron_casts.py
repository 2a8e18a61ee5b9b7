"""Megatron's layers cast their factors once a step, and what q, k and v read once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import BF16

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS = 5  # a swap after 4
SETTINGS: dict[str, Any] = BF16 | {
    "train__steps": STEPS,
    "train__eval_interval": 100,
    "train__micro_batch_size": 2,  # two micro-batches a step on two replicas, four on one
    "train__global_batch_size": 8,
    "model__num_layers": 1,
    "parallel__backend": "megatron",
}
LAYOUTS = {"two replicas": {}, "two shards": {"parallel__tensor_parallel": 2}}


def train(configs: list[Any]) -> list[dict[str, Any]]:
    """Train each run with the product for GPUs, first with casts that are kept, then without; also
    how often a layer's factors were cast."""
    from spectral_scale.backends.megatron.store import MegatronStore
    from spectral_scale.methods.sst import casts, forward, fused_product
    from spectral_scale.testing.megatron import megatron_in_one_group

    forward.FUSED_ON.add("cpu")
    cast_factors, count = casts.cast_factors, [0]

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return cast_factors(*arguments)

    found = []
    with megatron_in_one_group(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts, "cast_factors", counted)
        patch.setattr(fused_product, "cast_factors", counted)
        for config, kept in configs:
            patch.setattr(MegatronStore, "keeps_parameters", kept)
            count[0] = 0
            found.append(train_tiny(config) | {"casts": count[0]})
    return found


def test_kept_casts_change_nothing(corpus: Path, tmp_path: Path) -> None:
    runs = [
        (tiny_config(corpus, tmp_path / f"{name}{kept}", **SETTINGS, **keys), kept)
        for name, keys in LAYOUTS.items()
        for kept in (True, False)
    ]
    for ranks in run_distributed(train, 2, runs, timeout_seconds=300):
        for kept, again in (ranks[:2], ranks[2:]):
            # In each step once, and once for the evaluation at the end.
            assert kept["casts"] == 6 * (STEPS + 1) < again["casts"]
        kept, again = ranks[2:]
        assert kept["losses"] == again["losses"]
        assert all(np.array_equal(kept["tensors"][k], v) for k, v in again["tensors"].items())
        # Replicas cast common inputs together: sums over the same numbers in another order.
        kept, again = ranks[:2]
        assert kept["losses"] == pytest.approx(again["losses"], abs=2e-3)
