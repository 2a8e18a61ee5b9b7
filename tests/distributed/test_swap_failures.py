"""Failures inside a swap: a decomposition on its owner, and a rank that dies in each phase."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.methods.phases import PHASES
from spectral_scale.testing.distributed import RankError, run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny

WORLD = 2
BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {},
    "ZeRO-2": {"parallel__backend": "deepspeed", "parallel__zero_stage": 2},
    "FSDP2": {"parallel__backend": "fsdp2"},
}
SETTINGS: dict[str, Any] = {
    "spectral__steps_per_iteration": 2,
    "spectral__iterations_per_round": 1,
    "train__global_batch_size": 4,
    "train__eval_interval": 100,
    "data__validation_sequences": 2,
    "checkpoint__interval": 1,
}
KILLED_IN = {
    # "install": the new triplets have arrived and are not yet written
    "torch": [*PHASES[:7], "install", "reset"],
    "ZeRO-2": ["collect", "install", "reset"],
    "FSDP2": ["decompose", "deliver", "install"],
}


def die_in(config: Any, victim: int, phase: str, iteration: int) -> dict[str, Any]:
    """Train; rank `victim` is killed as it enters a phase of the swap before `iteration`."""
    import os
    import signal

    import torch.distributed as dist

    from spectral_scale.methods.phases import PhaseClock

    entered = PhaseClock.start
    here = int(os.environ["RANK"]) == victim

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(collective: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> None:
            collective(*arguments, **keywords)
            die()

        return call

    def listener(name: str, begins: int) -> None:
        if begins != iteration or not here:
            return
        if name == phase:
            die()
        if name == "deliver" and phase == "install":
            dist.broadcast, dist.scatter = after(dist.broadcast), after(dist.scatter)

    def listened(clock: PhaseClock, begins: int) -> None:
        clock.listeners = [listener]
        entered(clock, begins)

    PhaseClock.start = listened  # type: ignore[method-assign]
    return train_tiny(config)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_dies_in_each_phase(backend: str, corpus: Path, tmp_path: Path) -> None:
    """Survivors end with an error, and a restart goes on as if nothing had happened."""
    steps = 2 * len(KILLED_IN[backend]) + 1
    settings = SETTINGS | BACKENDS[backend] | {"train__steps": steps}
    broken = tiny_config(corpus, tmp_path / "broken", **settings)
    for i, phase in enumerate(KILLED_IN[backend]):
        victim = i % WORLD
        with pytest.raises(RankError) as caught:
            run_distributed(die_in, WORLD, broken, victim, phase, i + 1, timeout_seconds=60)
        failures = caught.value.failures
        assert "exit code -9" in failures.pop(victim), phase
        (survivor,) = failures.values()
        assert "still runs" not in survivor, phase
        assert "broke off in phase" in survivor, survivor
    resumed = run_distributed(train_tiny, WORLD, broken, timeout_seconds=60)
    assert min(resumed[0]["losses"]) == steps - 1  # each attempt went on from the last checkpoint
    undisturbed = tiny_config(corpus, tmp_path / "undisturbed", **settings)
    expected = run_distributed(train_tiny, WORLD, undisturbed, timeout_seconds=60)
    for found, wanted in zip(resumed, expected, strict=True):
        assert found["step"] == wanted["step"] == steps
        for name, value in wanted["tensors"].items():
            np.testing.assert_array_equal(found["tensors"][name], value, err_msg=name)


def fail_on_an_owner(config: Any, layer: str) -> tuple[str, list[str]]:
    """The SVD of one matrix gives NaN before iteration 1 and runs out of memory before iteration 2:
    what this rank raises, and its warnings."""
    import logging

    import torch

    from spectral_scale.errors import SpectralError
    from spectral_scale.methods.sst.bank import SpectralBank

    redecompose, svd = SpectralBank.redecompose, torch.linalg.svd
    warnings: list[str] = []
    seen = 0

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    def nan(*arguments: Any, **keywords: Any) -> Any:
        return tuple(torch.full_like(part, torch.nan) for part in svd(*arguments, **keywords))

    def broken(bank: SpectralBank, name: str) -> None:
        nonlocal seen
        if name == layer:
            seen += 1
            if seen == 2:
                raise torch.OutOfMemoryError("out of memory, injected")
            torch.linalg.svd = nan
        try:
            redecompose(bank, name)
        finally:
            torch.linalg.svd = svd

    logging.getLogger("spectral_scale").addHandler(Keep(logging.WARNING))
    SpectralBank.redecompose = broken  # type: ignore[method-assign]
    try:
        train_tiny(config)
    except SpectralError as error:
        return str(error), warnings
    return "nothing", warnings


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_decomposition(backend: str, corpus: Path, tmp_path: Path) -> None:
    """NaN factors: the owner keeps the old ones, which still sum to the matrix, and says so. Any
    other error: all ranks stop with one message that names rank and matrix."""
    layer = "model.decoder.layers.1.fc1"
    changes = SETTINGS | BACKENDS[backend] | {"train__steps": 5}
    config = tiny_config(corpus, tmp_path, **changes)
    ranks = run_distributed(fail_on_an_owner, WORLD, config, layer, timeout_seconds=60)
    (message,) = {message for message, _ in ranks}
    kept = {
        rank: [w for w in warnings if "keeps its factors" in w]
        for rank, (_, warnings) in enumerate(ranks)
    }
    (owner,) = (rank for rank, warnings in kept.items() if warnings)
    assert message.startswith(f"rank {owner}: swap: {layer}: out of memory, injected; restart")
    assert len(kept[owner]) == 1
    assert f"rank {owner}: {layer} keeps its factors" in kept[owner][0]
