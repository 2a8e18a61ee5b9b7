"""fp16 under ZeRO with DeepSpeed's dynamic loss scale: the numbers, and steps that overflow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import OFFLOADED

from spectral_scale.optim.schedules import lr_factor
from spectral_scale.testing.deepspeed import allow_fp16
from spectral_scale.testing.distributed import RankError, run_distributed
from spectral_scale.testing.equivalence import assemble
from spectral_scale.testing.tiny import tiny_config, train_in_turn, train_tiny

FP16 = {"train__precision": "fp16"}
STEPS, SWAP = 16, 4
STOPS = (2, 5)  # of two attempts: after a step that overflowed, and inside an iteration


def fp16_config(corpus: Path, run_dir: Path, stage: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "parallel__backend": "deepspeed",
        "parallel__zero_stage": stage,
        "train__micro_batch_size": 3,
        "optimizer__eps": 1e-5,
    }
    return tiny_config(corpus, run_dir, **(settings | FP16 | changes))


def train(runs: list[tuple[Any, int | None]]) -> list[dict[str, Any]]:
    """All runs, one after another, in this process."""
    allow_fp16()
    return train_in_turn(runs)


def test_equals_one_process(corpus: Path, tmp_path: Path) -> None:
    """fp16 rounds to 11 bits: losses are near those of fp32; masters keep what fp16 cannot."""
    plain = tiny_config(corpus, tmp_path / "alone", train__micro_batch_size=6, optimizer__eps=1e-5)
    (alone,) = run_distributed(train_tiny, 1, plain)
    cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {}), (3, {}), (3, OFFLOADED)]
    runs = [
        (fp16_config(corpus, tmp_path / str(i), stage, **changes), None)
        for i, (stage, changes) in enumerate(cases)
    ]
    ranks = run_distributed(train, 2, runs, timeout_seconds=150)
    for i, case in enumerate(cases):
        first, second = (rank[i] for rank in ranks)
        losses, reference = first["losses"], alone["losses"]
        assert max(abs(losses[s] - reference[s]) for s in reference) < 2e-3, case
        lines = [line for _, line in first["lines"] if "train/loss" in line]
        assert {line["train/loss_scale"] for line in lines} == {2.0**16}, case
        assert {line["train/skipped_steps"] for line in lines} == {0}, case
        for key in (k for k in lines[0] if k.startswith("train/grad_norm")):
            assert lines[0][key] == pytest.approx(alone["lines"][1][1][key], rel=1e-2), (case, key)
        masters = {n: t for n, t in assemble([first, second]).items() if n.startswith("model/")}
        assert any((t.astype(np.float16) != t).any() for t in masters.values()), case


# -- overflow ------------------------------------------------------------------------------------


def overflowing(corpus: Path, run_dir: Path, stage: int) -> Any:
    """A scale far too high, which also doubles again after few steps."""
    scale = {"enabled": "auto", "initial_scale_power": 21, "hysteresis": 1, "loss_scale_window": 3}
    path = run_dir.parent / "ds.json"
    path.write_text(json.dumps({"fp16": scale}))
    changes = {"parallel__deepspeed_config": str(path), "train__steps": STEPS}
    changes |= {"optimizer__schedule": "linear", "checkpoint__interval": 3}
    return fp16_config(corpus, run_dir, stage, **changes)


def faults(result: dict[str, Any], config: Any) -> list[str]:
    """What a run with overflows did other than leave the step out, of all but its data."""
    lines = [(step, line) for step, line in result["lines"] if "train/loss" in line]
    found, skipped = [], 0
    for step, line in lines:
        overflowed = "train/grad_norm" not in line
        skipped += overflowed
        applied = step - skipped
        if line["train/skipped_steps"] != skipped:
            found.append(f"{step}: counts {line['train/skipped_steps']} skipped, not {skipped}")
        before = applied - (not overflowed)
        lr = config.optimizer.lr * lr_factor(config.optimizer, before, STEPS)
        if line["train/lr/dense"] != pytest.approx(lr, rel=1e-12):
            found.append(f"{step}: learning rate {line['train/lr/dense']}, not {lr}")
        swapped = "spectral/iteration" in line
        if swapped != (not overflowed and applied % SWAP == 0):
            found.append(f"{step}: swap {swapped} after {applied} applied steps")
    if not 3 <= skipped <= STEPS - 2 * SWAP:
        found.append(f"{skipped} steps overflowed: the test needs some, and two swaps")
    steps = {float(t) for n, t in result["tensors"].items() if n.endswith("sigma/step")}
    if steps != {float((STEPS - skipped) % SWAP)}:
        found.append(f"Adam's steps since the last swap: {steps}")
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_overflows_advances_nothing_but_data(
    stage: int, corpus: Path, tmp_path: Path
) -> None:
    """And a run that is stopped there, and again, goes on bit for bit, its loss scale included."""
    straight = overflowing(corpus, tmp_path / "a", stage)
    broken = overflowing(corpus, tmp_path / "b", stage)
    runs = [(straight, None), (broken, STOPS[0]), (broken, STOPS[1]), (broken, None)]
    ranks = run_distributed(train, 2, runs, timeout_seconds=150)
    expected, *attempts = ranks[0]
    assert faults(expected, straight) == []
    scales = [line["train/loss_scale"] for _, line in expected["lines"] if "train/loss" in line]
    assert scales[:3] == [2.0**21, 2.0**20, 2.0**19]
    assert attempts[0]["step"] == STOPS[0] and attempts[1]["step"] == sum(STOPS)
    assert expected["losses"] == {s: v for a in attempts for s, v in a["losses"].items()}
    for rank in ranks:
        straight_tensors, resumed = (trained(rank[i]["tensors"]) for i in (0, 3))
        assert straight_tensors.keys() == resumed.keys()
        different = [k for k, v in straight_tensors.items() if not np.array_equal(resumed[k], v)]
        assert different == []
    assert "loss_scaler" in expected["tensors"]


def trained(tensors: dict[str, Any]) -> dict[str, Any]:
    """All but frozen weights, which are rebuilt, and may be gathered at the end or not."""
    return {k: v for k, v in tensors.items() if not k.startswith("frozen/")}


def count_what_was_skipped() -> None:
    """The schedule goes on as if the step had been applied."""
    from spectral_scale.engine.late_verdict import LateVerdicts

    LateVerdicts._left_out = lambda *_: None  # type: ignore[method-assign]


def call_it_applied() -> None:
    """The controller is told of a step that updated nothing."""
    from spectral_scale.backends.base import StepStats
    from spectral_scale.backends.deepspeed.backend import DeepSpeedBackend

    step = DeepSpeedBackend.step

    def lying(self: Any, **arguments: Any) -> StepStats:
        stats = step(self, **arguments)
        return StepStats(applied=True, grad_norms=stats.grad_norms, overflowed=stats.overflowed)

    DeepSpeedBackend.step = lying  # type: ignore[method-assign]


def train_broken(config: Any, twin: Callable[[], None]) -> dict[str, Any]:
    allow_fp16()
    twin()
    return train_tiny(config)


def test_a_step_that_is_counted_would_show(corpus: Path, tmp_path: Path) -> None:
    config = overflowing(corpus, tmp_path / "a", 2)
    (result,) = run_distributed(train_broken, 1, config, count_what_was_skipped)
    assert any("learning rate" in fault for fault in faults(result, config))
    config = overflowing(corpus, tmp_path / "b", 2)
    with pytest.raises(RankError, match="was not retracted in the last optimizer step"):
        run_distributed(train_broken, 1, config, call_it_applied)
