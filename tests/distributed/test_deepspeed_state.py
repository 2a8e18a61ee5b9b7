"""Checkpoints of ZeRO runs: bit-exact resume, and any stage, world size or backend from another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble
from spectral_scale.testing.tiny import tiny_config, train_in_turn, train_tiny

STEPS = 10  # swaps after 4 and 8, the second with a re-SVD
INSIDE = 6  # between two swaps
BATCH = 12


def config_of(corpus: Path, run_dir: Path, world: int, stage: int | None, **changes: Any) -> Any:
    """A run on `world` ranks: plain torch, or a ZeRO stage."""
    settings: dict[str, Any] = {"train__steps": STEPS, "train__global_batch_size": BATCH}
    settings |= {"train__micro_batch_size": BATCH // (2 * world), "optimizer__eps": 1e-5}
    if stage is not None:
        settings |= {"parallel__backend": "deepspeed", "parallel__zero_stage": stage}
    return tiny_config(corpus, run_dir, **(settings | changes))


def train(world: int, config: Any, stop_after: int | None = None) -> list[dict[str, Any]]:
    return run_distributed(train_tiny, world, config, stop_after, timeout_seconds=120)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (2, {"train__precision": "bf16"}),
        (3, {}),
        (3, {"parallel__offload": "cpu", "train__precision": "bf16"}),
    ],
    ids=str,
)
def test_resume_is_bit_exact(
    stage: int, changes: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    straight = train(2, config_of(corpus, tmp_path / "a", 2, stage, **changes))
    broken = config_of(corpus, tmp_path / "b", 2, stage, **changes)
    first, second = train(2, broken, INSIDE), train(2, broken)
    assert first[0]["step"] == INSIDE
    assert first[0]["losses"] | second[0]["losses"] == straight[0]["losses"]
    for resumed, expected in zip(second, straight, strict=True):
        assert_same(resumed["tensors"], expected["tensors"])


@pytest.mark.parametrize(
    ("written_by", "loaded_by"),
    [
        ((4, 2), [(2, 3), (1, None), (2, 0)]),
        ((3, 3), [(2, 1), (1, None)]),
        ((1, None), [(3, 3), (2, 2)]),
    ],
    ids=["ZeRO-2 on 4", "ZeRO-3 on 3", "torch"],
)
def test_state_is_bit_identical_after_load(
    written_by: tuple[int, int | None],
    loaded_by: list[tuple[int, int | None]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    """Pairs are (ranks, ZeRO stage): saved inside an iteration, loaded without a further step."""

    def complete(world: int, stage: int | None) -> dict[str, Any]:
        changes = {"train__steps": INSIDE, "train__micro_batch_size": BATCH // world}
        return assemble(train(world, config_of(corpus, tmp_path, world, stage, **changes)))

    written = complete(*written_by)
    for world, stage in loaded_by:
        assert_same(complete(world, stage), written)


def test_through_fsdp2_and_back(corpus: Path, tmp_path: Path) -> None:
    """Every backend loads what another has saved inside an iteration, bit for bit, takes a step,
    and saves for the next."""
    folder, runs, hosts = tmp_path / "run", [], (2, "fsdp2", 3, None, "fsdp2", 2)

    def config(host: int | str | None, steps: int) -> Any:
        sharded = {"parallel__backend": "fsdp2"} if host == "fsdp2" else {}
        stage = host if isinstance(host, int) else None
        return config_of(corpus, folder, 2, stage, train__steps=steps, **sharded)

    for step, host in enumerate(hosts, start=5):
        runs += [] if step == 5 else [config(host, step - 1)]  # loads, and takes no step
        runs += [config(host, step)]
    straight = config_of(corpus, tmp_path / "straight", 2, None)
    everything = [(run, None) for run in (*runs, straight)]
    ranks = run_distributed(train_in_turn, 2, everything, timeout_seconds=250)
    states = [assemble([rank[i] for rank in ranks]) for i in range(len(runs))]
    for saved, loaded in zip(states[0:-1:2], states[1::2], strict=True):
        assert_same(loaded, saved)
    *parts, expected = (run["losses"] for run in ranks[0])
    losses = {step: loss for part in parts for step, loss in part.items()}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_reshard_and_migrate(corpus: Path, tmp_path: Path) -> None:
    """Interrupted inside an iteration and continued elsewhere: the same losses within rounding."""
    straight = train(1, config_of(corpus, tmp_path / "a", 1, None))[0]["losses"]
    losses: dict[int, float] = {}
    for world, stage, stop in ((3, 2, 3), (2, 3, 3), (1, None, None)):
        micro = {"train__micro_batch_size": BATCH // world}
        config = config_of(corpus, tmp_path / "b", world, stage, **micro)
        losses |= train(world, config, stop)[0]["losses"]
    assert losses == pytest.approx(straight, rel=1e-6)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit; frozen weights, rebuilt from the bank, may be gathered at the end or not."""
    found, expected = (
        {k: v for k, v in d.items() if "frozen/" not in k} for d in (found, expected)
    )
    assert found.keys() == expected.keys()
    different = [n for n, value in expected.items() if not np.array_equal(found[n], value)]
    assert not different
