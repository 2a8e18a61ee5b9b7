"""Steps that the device leaves out and the host learns of later: the same bits on two ranks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.supervision.incidents import read_incidents
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_in_turn

BAD_DATA_STEPS = (5, 6)
CHANGES: dict[str, Any] = {
    "model__num_heads": 4,
    "model__num_layers": 1,
    "train__steps": 10,  # swaps after 4 and 8 applied steps
    "train__eval_interval": 100,
    "train__micro_batch_size": 3,
    "checkpoint__interval": 100,
    "data__validation_sequences": 4,
}
BACKENDS: dict[str, dict[str, dict[str, Any]]] = {
    "torch": {
        "ddp": {},
        "fsdp2": {"parallel__backend": "fsdp2"},
        "hsdp": {"parallel__backend": "fsdp2", "parallel__shard_group": 1},
        "fsdp2+tp": {"parallel__backend": "fsdp2", "parallel__tensor_parallel": 2},
    },
    "megatron": {
        "replicas": {"parallel__backend": "megatron", "parallel__distributed_optimizer": "false"},
        "sharded": {"parallel__backend": "megatron"},
        "tp": {"parallel__backend": "megatron", "parallel__tensor_parallel": 2},
    },
}
INTERVALS = {"at_once": 1, "late": 100}


def spoil_and_train(configs: Any, rank: int) -> Any:
    """The loss of rank `rank` is NaN in two steps; which steps were left open comes first."""
    from spectral_scale.engine import late_verdict, loop
    from spectral_scale.parallel.rank_info import detect_rank_info

    forward, add, opened = loop.TrainingLoop._forward_backward, late_verdict.LateVerdicts.add, []

    def forward_backward(self: Any, batch: Any) -> Any:
        loss = forward(self, batch)
        bad = batch.step in BAD_DATA_STEPS and detect_rank_info().rank == rank
        return loss * math.nan if bad else loss

    def noted(self: Any, step: int, *arguments: Any, **keys: Any) -> Any:
        stats = add(self, step, *arguments, **keys)
        opened.extend([step] if stats.applied is None else [])
        return stats

    loop.TrainingLoop._forward_backward = forward_backward  # type: ignore[method-assign]
    late_verdict.LateVerdicts.add = noted  # type: ignore[method-assign]
    train = train_in_turn
    if configs[0][0].parallel.backend == "megatron":
        from spectral_scale.testing.megatron import train_in_turn_on_cpu as train
    return [opened, *train(configs)]


@pytest.mark.parametrize("package", BACKENDS)
def test_late_is_as_at_once_on_two_ranks(package: str, corpus: Path, tmp_path: Path) -> None:
    if package == "megatron":
        pytest.importorskip("megatron.core")
    configs = {
        (name, when): tiny_config(
            corpus, tmp_path / name / when, **CHANGES, **keys, metrics__log_interval=interval
        )
        for name, keys in BACKENDS[package].items()
        for when, interval in INTERVALS.items()
    }
    runs = [(config, None) for config in configs.values()]
    for opened, *found in run_distributed(spoil_and_train, 2, runs, 1, timeout_seconds=600):
        results = dict(zip(configs, found, strict=True))
        assert opened.count(6) == opened.count(7) == len(BACKENDS[package])
        for name in BACKENDS[package]:
            late, at_once = (results[name, when]["tensors"] for when in ("late", "at_once"))
            assert late.keys() == at_once.keys()
            for key in late:
                assert np.array_equal(late[key], at_once[key]), (name, key)
    for name in BACKENDS[package]:
        reasons = {
            when: [(i["step"], i["reason"]) for i in read_incidents(tmp_path / name / when)]
            for when in INTERVALS
        }
        expected = "loss or gradient not finite on rank 1"
        assert reasons["late"] == reasons["at_once"] == [(6, expected), (7, expected)], name
