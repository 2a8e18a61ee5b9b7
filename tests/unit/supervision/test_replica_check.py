"""Copies on several ranks are compared bit for bit; a flipped bit is found and named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale.errors import HealthError
from spectral_scale.supervision.replica_check import check_replicas, tensor_hash
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import one_process_group, tiny_config, train_tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_any_flipped_bit_changes_the_hash(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(37, 3).mul(100).to(dtype)
    before = tensor_hash(tensor)
    assert tensor_hash(tensor.clone()) == before
    as_bytes = tensor.view(-1).view(torch.uint8)
    for place in (0, len(as_bytes) // 2, len(as_bytes) - 1):
        for bit in range(8):
            as_bytes[place] ^= 1 << bit
            assert tensor_hash(tensor) != before
            as_bytes[place] ^= 1 << bit
    swapped = tensor.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert tensor_hash(swapped) != before


class Three:
    """Three ranks, of which the others' parts are given."""

    rank, world_size = 0, 3

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def gather_json(self, value: Any) -> list[Any]:
        return [value, *self.others]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        return value


def test_the_odd_rank_out_is_named() -> None:
    tensors = [("model/a", torch.ones(2), 0), ("model/b", torch.zeros(2), 0)]
    good = [tensor_hash(t) for _, t, _ in tensors]
    ranks: Any = Three([[[0, 0], good], [[0, 0], [good[0], 5]]])
    with pytest.raises(HealthError, match="model/b on rank 2 differs from the other ranks'"):
        check_replicas(tensors, ranks)
    shards: Any = Three([[[0, 1], [good[0], 5]], [[0, 1], [good[0], 5]]])
    assert check_replicas(tensors, shards) == 2, "other shards are no replicas"
    fewer: Any = Three([[[0], good[:1]], [[0, 0], good]])
    with pytest.raises(HealthError, match="all must hold as many"):
        check_replicas(tensors, fewer)


def corrupted_after_step(rank: int, step: int, name: str) -> None:
    """One rank's copy of a tensor loses a bit when a step has been applied."""
    from spectral_scale.engine import loop

    original = loop.TrainingLoop._update

    def update(self: Any, loss: Any) -> Any:
        stats = original(self, loss)
        if self.run.backend.collective.rank == rank and self.step + 1 == step:
            found = {n: tensor for n, tensor, _ in self.run.backend.replicated()}[name]
            found.view(-1).view(torch.uint8)[0] ^= 1
        return stats

    loop.TrainingLoop._update = update  # type: ignore[method-assign]


FROZEN = "model/model.decoder.layers.0.fc1.residual"
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "torch": ({}, "optimizer/model.decoder.layers.0.fc1.sigma/exp_avg_sq"),
    "zero2": ({"parallel__backend": "deepspeed", "parallel__zero_stage": 2}, FROZEN),
    "fsdp2": ({"parallel__backend": "fsdp2", "parallel__residual": "replicated"}, FROZEN),
}


def train_corrupted(configs: list[Any]) -> list[str]:
    from spectral_scale.engine import loop

    messages = []
    original = loop.TrainingLoop._update
    with one_process_group():
        for config, name in configs:
            corrupted_after_step(1, 3, name)
            try:
                train_tiny(config)
                messages.append("nothing was noticed")
            except HealthError as error:
                messages.append(str(error))
            loop.TrainingLoop._update = original  # type: ignore[method-assign]
    return messages


def test_a_flipped_bit_on_one_rank_is_found_on_every_backend(corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model__num_layers": 1,
        "train__steps": 6,
        "train__micro_batch_size": 3,
        "train__eval_interval": 100,
        "spectral__steps_per_iteration": 100,  # a swap would overwrite the damage
        "health__replica_interval": 2,
    }
    configs = [
        (tiny_config(corpus, tmp_path / case, **changes | keys), name)
        for case, (keys, name) in CASES.items()
    ]
    for messages in run_distributed(train_corrupted, 2, configs, timeout_seconds=200):
        for (case, (_, name)), message in zip(CASES.items(), messages, strict=True):
            assert f"{name} differs between rank 0 and 1" in message, case
