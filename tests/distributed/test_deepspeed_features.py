"""What users of DeepSpeed switch on, in real runs: dropout, recomputation, profilers, CPU Adam."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import one_process_group, tiny_config, train_tiny

STEPS, STOP = 10, 6  # swaps after 4 and 8; stopped inside an iteration
DROPOUT = {"model__dropout": 0.1}


def zero_config(corpus: Path, run_dir: Path, stage: int | None, **changes: Any) -> Any:
    """A run on two ranks: of plain torch, or of a ZeRO stage."""
    settings: dict[str, Any] = {
        "train__steps": STEPS,
        "train__micro_batch_size": 3,
        "optimizer__eps": 1e-5,
    }
    if stage is not None:
        settings |= {"parallel__backend": "deepspeed", "parallel__zero_stage": stage}
    return tiny_config(corpus, run_dir, **(settings | changes))


def gap(found: dict[int, float], expected: dict[int, float]) -> float:
    """Largest difference of a step's loss."""
    assert found.keys() == expected.keys()
    return max(abs(found[step] - expected[step]) for step in expected)


def train_counting_blocks(runs: list[Any]) -> list[dict[str, Any]]:
    """Train, and count the training forward passes of the first block's attention in each run."""
    from transformers.models.opt.modeling_opt import OPTAttention

    forward, calls = OPTAttention.forward, 0

    def counting(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += int(self.training and self.layer_idx == 0)
        return forward(self, *arguments, **keywords)

    OPTAttention.forward = counting  # type: ignore[method-assign]
    results = []
    with one_process_group():
        for config, stop_after in runs:
            calls = 0
            result = train_tiny(config, stop_after)
            results.append(result | {"blocks": calls})
    return results


def test_dropout_and_recomputation_equal_ddp(corpus: Path, tmp_path: Path) -> None:
    """Dropout masks are those of plain torch, also where a block runs twice; a run goes on
    bit for bit after a stop inside an iteration."""
    recomputed = DROPOUT | {"model__activation_checkpointing": True}
    offloaded = recomputed | {"parallel__offload": "cpu"}
    runs = [(zero_config(corpus, tmp_path / "ddp", None, **DROPOUT), None)]
    others = [(0, recomputed), (1, recomputed), (2, offloaded), (3, offloaded)]
    for i, (stage, changes) in enumerate(others):
        runs.append((zero_config(corpus, tmp_path / f"{i}", stage, **changes), None))
    for stage in (2, 3):
        straight = zero_config(corpus, tmp_path / f"{stage}a", stage, **recomputed)
        broken = zero_config(corpus, tmp_path / f"{stage}b", stage, **recomputed)
        runs += [(straight, None), (broken, STOP), (broken, None)]
    ranks = run_distributed(train_counting_blocks, 2, runs, timeout_seconds=250)
    ddp, micro_batches = ranks[0][0], 2 * STEPS
    assert ddp["blocks"] == micro_batches
    for straight in (ranks[0][i] for i in (1, 2, 3, 4, 5, 8)):
        assert gap(straight["losses"], ddp["losses"]) < 1e-5
        assert straight["blocks"] == 2 * micro_batches, "every block must run twice a micro-batch"
    for first in (5, 8):
        straight, stopped, resumed = ranks[0][first : first + 3]
        assert stopped["step"] == STOP
        assert stopped["losses"] | resumed["losses"] == straight["losses"]
        for rank in ranks:
            assert_same(rank[first + 2]["tensors"], rank[first]["tensors"])


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit; frozen weights, rebuilt from the bank, may be gathered at the end or not."""
    found, expected = (
        {k: v for k, v in d.items() if "frozen/" not in k} for d in (found, expected)
    )
    assert found.keys() == expected.keys()
    assert not [n for n, value in expected.items() if not np.array_equal(found[n], value)]


def train_with_other_masks(config: Any) -> dict[str, Any]:
    """Recompute each block with masks of its own."""
    import torch.utils.checkpoint as recomputation

    plain = recomputation.checkpoint

    def forgetful(*arguments: Any, **keywords: Any) -> Any:
        return plain(*arguments, **(keywords | {"preserve_rng_state": False}))

    import transformers.modeling_utils as utilities

    recomputation.checkpoint = utilities.checkpoint = forgetful
    return train_tiny(config)


def test_masks_of_its_own_in_recomputation_would_show(corpus: Path, tmp_path: Path) -> None:
    changes = DROPOUT | {"train__steps": 3, "train__micro_batch_size": 6}
    plain = zero_config(corpus, tmp_path / "a", None, **changes)
    changes |= {"model__activation_checkpointing": True}
    broken = zero_config(corpus, tmp_path / "b", 2, **changes)
    (expected,) = run_distributed(train_tiny, 1, plain)
    (found,) = run_distributed(train_with_other_masks, 1, broken)
    assert gap(found["losses"], expected["losses"]) > 1e-5


# -- DeepSpeed's own measurements ----------------------------------------------------------------


def train_and_listen(runs: list[Any]) -> tuple[list[dict[str, Any]], str]:
    """The results, and what DeepSpeed printed meanwhile."""
    with redirect_stdout(io.StringIO()) as printed:
        results = []
        with one_process_group():
            results = [train_tiny(config, stop_after) for config, stop_after in runs]
    return results, printed.getvalue()


@pytest.mark.parametrize("stage", [2, 3])
def test_measurements_are_printed_and_change_no_number(
    stage: int, corpus: Path, tmp_path: Path
) -> None:
    profiler = {"enabled": True, "profile_step": 2, "output_file": str(tmp_path / "f")}
    settings: dict[str, Any] = {
        "comms_logger": {"enabled": True, "prof_all": True},
        "wall_clock_breakdown": True,
    }
    if stage == 2:  # refused in stage 3
        settings["flops_profiler"] = profiler
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    changes = {"train__steps": 5, "train__micro_batch_size": 6}
    plain = zero_config(corpus, tmp_path / "a", stage, **changes)
    changes |= {"parallel__deepspeed_config": str(tmp_path / "ds.json")}
    measured = zero_config(corpus, tmp_path / "b", stage, **changes)
    (results, printed), _ = run_distributed(
        train_and_listen, 2, [(plain, None), (measured, None)], timeout_seconds=200
    )
    assert results[0]["losses"] == results[1]["losses"]
    assert_same(results[1]["tensors"], results[0]["tensors"])
    assert "Comm. Op" in printed and "reduce" in printed
    assert re.search(r"time \(ms\).*bwd", printed)
    if stage == 2:
        profile = (tmp_path / "f").read_text()
        assert "DeepSpeed Flops Profiler" in profile
        assert "SpectralLinear" in profile
