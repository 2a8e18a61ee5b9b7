"""Backends that shard weights never hold the whole model, not even while it gets its memory."""

from pathlib import Path
from typing import Any

import pytest

from spectral_scale.config.resolve import resolve
from spectral_scale.plan.build import RESERVED_BYTES, plan_run
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config

SETTINGS: dict[str, Any] = {
    "health__hang_timeout_seconds": 1000,  # so that waits are longer than by default
    "model__hidden_size": 64,
    "model__num_layers": 8,
    "spectral__method": "full",
}
BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp2": {"parallel__backend": "fsdp2", "train__precision": "fp32"},
    "zero3": {
        "parallel__backend": "deepspeed",
        "parallel__zero_stage": 3,
        "train__precision": "bf16",
    },
}

OWN_BYTES = {"fsdp2": 0, "zero3": 5 << 20}
"""What DeepSpeed allocates for itself at the start, 4.3 to 4.7 MB at widths from 64 to 256."""


def start(config: Any, whole_first: bool) -> dict[str, int]:
    """Build a run on this rank, and count.

    Args:
        config: the run.
        whole_first: give every rank the whole model before it is sharded.
    """
    import torch
    from torch.distributed.distributed_c10d import _world

    from spectral_scale.backends.base import Backend
    from spectral_scale.backends.deepspeed.backend import DeepSpeedBackend
    from spectral_scale.backends.fsdp2.backend import FSDP2Backend
    from spectral_scale.backends.limits import wait_limits
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.memory import PeakMemory
    from spectral_scale.testing.tiny import build_from_config

    counted: dict[str, int] = {}
    for kind in (FSDP2Backend, DeepSpeedBackend):
        make = Backend.make if whole_first else kind.make

        def measured(*args: Any, _make: Any = make, **options: Any) -> None:
            with PeakMemory() as memory:
                _make(*args, **options)
            counted.update(peak=memory.peak_bytes, kept=memory.current_bytes)

        kind.make = measured  # type: ignore[method-assign]
    create_run_folder(Path(config.train.run_dir))
    with PeakMemory() as all_of_it:
        run = build_from_config(config)
    size = 4 if config.train.precision == "fp32" else 2
    sizes: dict[str, int] = {}
    for fqn, info in run.table.items():
        numel = 1
        for length in info.global_shape:
            numel *= length
        block = fqn.split("layers.")[-1].split(".")[0] if "layers." in fqn else fqn
        sizes[block] = sizes.get(block, 0) + size * numel
    limits = {group._get_backend(torch.device("cpu")).options._timeout for group in _world.pg_map}
    assert limits == {wait_limits(run.resolved, "cpu").collective}, "of every group there is"
    run.backend.close()
    counted |= {"whole": sum(sizes.values()), "block": max(sizes.values())}
    return counted | {"start": all_of_it.peak_bytes}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole_first", [False, True], ids=["sharded", "whole_first"])
def test_a_rank_never_holds_more_than_its_shards_and_a_block(
    backend: str, whole_first: bool, corpus: Path, tmp_path: Path
) -> None:
    """Counted while parameters get memory and values; host copies of initial values count, too.
    The twin makes the model whole first."""
    config = tiny_config(corpus, tmp_path / "run", **(SETTINGS | BACKENDS[backend]))
    plan = plan_run(resolve(config, world_size=2), gpu_memory_bytes=80e9)
    for found in run_distributed(start, 2, config, whole_first):
        shards = found["whole"] / 2
        assert found["whole"] > shards + 2 * found["block"], "the model must have many blocks"
        if whole_first:
            assert found["peak"] > shards + found["block"]
        else:
            assert found["peak"] <= shards + found["block"]
            assert found["kept"] == pytest.approx(shards, rel=0.05)
            planned = plan.start_peak_bytes - RESERVED_BYTES + OWN_BYTES[backend]
            assert found["start"] <= planned + found["block"]
