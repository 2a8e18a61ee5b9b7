"""Owners pack what they deliver: fewer messages, the same bytes, the same numbers."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config

MATRICES, WORLD = 12, 2
SENDING = ("broadcast", "scatter", "send")
BACKENDS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO-2": {"parallel__backend": "deepspeed", "parallel__zero_stage": 2},
    "ZeRO-3": {"parallel__backend": "deepspeed", "parallel__zero_stage": 3},
    "FSDP2": {"parallel__backend": "fsdp2"},
    "FSDP2, residual replicated": {
        "parallel__backend": "fsdp2",
        "parallel__residual": "replicated",
    },
}


def deliver_twice(config: Any) -> dict[str, Any]:
    """At a swap, install every bucket tensor by tensor, wipe it, and install it packed."""
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.tiny import build_from_config
    from spectral_scale.testing.traffic import TrafficCounter

    create_run_folder(Path(config.train.run_dir))
    run = build_from_config(config, detect_rank_info())
    store = run.controller.swap.store
    scatter = store.scatter
    calls: dict[str, Counter[str]] = {"single": Counter(), "packed": Counter()}
    sent: dict[str, Counter[str]] = {"single": Counter(), "packed": Counter()}
    different: list[str] = []

    def both(values: Any, *, owner: int) -> None:
        with TrafficCounter() as counter:
            for fqn, value in values.items():
                scatter({fqn: value}, owner=owner)
        calls["single"] += counter.calls
        sent["single"] += counter.payload_bytes
        first = {name: tensor.clone() for name, tensor in held(run, values)}
        for _, tensor in held(run, values):
            tensor.zero_()
        with TrafficCounter() as counter:
            scatter(values, owner=owner)
        calls["packed"] += counter.calls
        sent["packed"] += counter.payload_bytes
        different.extend(n for n, t in held(run, values) if not t.equal(first[n]))

    store.scatter = both
    loop = TrainingLoop(run, NullLog(), None)
    for batch in run.loader.steps(0, 4):
        loop._one_step(batch)
    run.backend.close()
    return {"calls": calls, "sent": sent, "different": different}


def held(run: Any, fqns: Any) -> list[tuple[str, Any]]:
    """What this rank holds of parameters: weights and, apart from them, masters."""
    from spectral_scale.parallel.dtensor_collectives import local

    found = []
    for name, parameter in run.model.named_parameters():
        if name in fqns:
            piece = getattr(parameter, "ds_tensor", None)
            found.append((name, local(parameter) if piece is None else piece.data))
    for chunk in run.backend.state_chunks():
        if chunk.name.removeprefix("model/") in fqns:
            found.append((f"master {chunk.key}", chunk.tensor.detach()))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend: str, corpus: Path, tmp_path: Path) -> None:
    settings = {"train__precision": "bf16", "train__global_batch_size": 4} | BACKENDS[backend]
    config = tiny_config(corpus, tmp_path, **settings)
    ranks = run_distributed(deliver_twice, WORLD, config, timeout_seconds=120)
    assert not [found["different"] for found in ranks if found["different"]]
    single, packed = (sum_of(ranks, "calls", way) for way in ("single", "packed"))
    if backend == "ZeRO-3":  # a rank sends what it owns; all in fp32, and in bf16
        assert (single, packed) == (MATRICES * 4, WORLD * 2)
    else:  # all ranks take part in each; u, v, sigma, residual of every matrix
        assert (single, packed) == (WORLD * MATRICES * 4, WORLD * WORLD * 2)
    bytes_single, bytes_packed = (sum_of(ranks, "sent", way) for way in ("single", "packed"))
    assert bytes_single == bytes_packed > 0


def sum_of(ranks: list[dict[str, Any]], what: str, way: str) -> int:
    return sum(found[what][way][operation] for found in ranks for operation in SENDING)


def train_in_parcels(config: Any, limit: int) -> dict[str, Any]:
    """Train with buckets of `limit` bytes; the calls of the store at each delivery."""
    from spectral_scale.methods import buckets as buckets
    from spectral_scale.parallel.store import TorchStore
    from spectral_scale.testing.tiny import train_tiny

    buckets.BUCKET_BYTES = limit
    sizes: list[int] = []
    scatter = TorchStore.scatter

    def counted(store: Any, values: Any, *, owner: int) -> None:
        sizes.append(len(values))
        scatter(store, values, owner=owner)

    TorchStore.scatter = counted  # type: ignore[method-assign]
    return train_tiny(config) | {"sizes": sizes}


def test_buckets_do_not_change_the_run(corpus: Path, tmp_path: Path) -> None:
    """A matrix a bucket, and all in one a rank: bit-identical, over a swap and a re-SVD."""
    import numpy as np

    found = {}
    for limit in (1, 2**30):
        settings = {"train__steps": 9, "train__global_batch_size": 4, "train__precision": "bf16"}
        config = tiny_config(corpus, tmp_path / str(limit), **settings)
        found[limit] = run_distributed(train_in_parcels, WORLD, config, limit)
    deliveries = 3  # at the start and at two swaps
    assert found[1][0]["sizes"] == [4] * MATRICES * deliveries
    assert found[2**30][0]["sizes"] == [4 * MATRICES // WORLD] * WORLD * deliveries
    for one, all_in_one in zip(found[1], found[2**30], strict=True):
        assert one["losses"] == all_in_one["losses"]
        for name, value in one["tensors"].items():
            np.testing.assert_array_equal(all_in_one["tensors"][name], value)
