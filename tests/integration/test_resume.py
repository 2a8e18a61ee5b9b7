"""N steps = k + a fresh process + (N - k), bit for bit: weights, bank, moments, losses, data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS = 14  # swaps after 4, 8 (re-SVD), 12; iterations of 4 steps, rounds of 2

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "inside an iteration, before, at and after a swap": ({}, (2, 3, 4, 5)),
    "before, at and after a re-SVD": ({}, (7, 8, 9)),
    "factored storage": ({"spectral__storage": "factored"}, (6, 8)),
    "partitioned, staggered": (
        {"spectral__sampling": "partitioned", "spectral__stagger_rounds": True},
        (7,),
    ),
    "extra sigma, kept moments": (
        {"spectral__extra_sigma": 4, "spectral__boundary_moments": "keep_redrawn"},
        (3, 4, 5, 9),
    ),
    "gradient accumulation": ({"train__micro_batch_size": 1}, (5,)),
    "dropout": ({"model__dropout": 0.1}, (5,)),
    "loader workers": ({"data__num_workers": 2}, (5,)),
    "bf16": ({"train__precision": "bf16"}, (8, 9)),
    "width-scaled directions, cosine, decay": (
        {
            "spectral__direction_lr_scaling": "width",
            "optimizer__schedule": "cosine",
            "optimizer__weight_decay": 0.1,
        },
        (9,),
    ),
    "second epoch": ({"model__sequence_length": 64, "train__global_batch_size": 120}, (5, 11)),
    "dense training": ({"spectral__method": "full"}, (5,)),
    "LLaMA": ({"model__name": "llama-60m"}, (8,)),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact(case: str, corpus: Path, tmp_path: Path) -> None:
    changes, stops = CASES[case]
    changes = {"train__steps": STEPS} | changes
    straight = run_distributed(train_tiny, 1, tiny_config(corpus, tmp_path / "a", **changes))[0]
    broken = tiny_config(corpus, tmp_path / "b", **changes)
    losses: dict[int, float] = {}
    taken = 0
    for stop in (*stops, None):
        attempt = run_distributed(train_tiny, 1, broken, None if stop is None else stop - taken)[0]
        assert attempt["step"] == (stop or STEPS)
        losses |= attempt["losses"]
        taken = attempt["step"]
    assert losses == straight["losses"]
    assert_same_tensors(attempt["tensors"], straight["tensors"])
    validation = [values for _, values in attempt["lines"] if "validation/loss" in values]
    expected = [values for _, values in straight["lines"] if "validation/loss" in values]
    assert validation[-1]["validation/loss"] == expected[-1]["validation/loss"]


def test_resume_in_a_second_epoch_was_one(corpus: Path, tmp_path: Path) -> None:
    """The case above does reach a second epoch."""
    from spectral_scale.data.tokens import open_tokens

    samples = (open_tokens(corpus / "train").num_tokens - 1) // 64
    assert 5 * 120 > samples


def test_ddp_resume_is_bit_exact(corpus: Path, tmp_path: Path) -> None:
    changes = {"train__steps": STEPS, "train__micro_batch_size": 3}
    straight = run_distributed(train_tiny, 2, tiny_config(corpus, tmp_path / "a", **changes))
    broken = tiny_config(corpus, tmp_path / "b", **changes)
    first = run_distributed(train_tiny, 2, broken, 6)
    second = run_distributed(train_tiny, 2, broken)
    assert first[0]["step"] == 6
    assert first[0]["losses"] | second[0]["losses"] == straight[0]["losses"]
    for resumed, expected in zip(second, straight, strict=True):
        assert_same_tensors(resumed["tensors"], expected["tensors"])


def test_resume_at_another_world_size(corpus: Path, tmp_path: Path) -> None:
    """Saved by two ranks, continued by one: the same data order, losses within rounding."""
    changes = {"train__steps": STEPS, "train__micro_batch_size": 3}
    straight = run_distributed(train_tiny, 1, tiny_config(corpus, tmp_path / "a", **changes))[0]
    config = tiny_config(corpus, tmp_path / "b", **changes)
    run_distributed(train_tiny, 2, config, 6)
    second = run_distributed(train_tiny, 1, config)[0]
    for step, loss in second["losses"].items():
        assert abs(loss - straight["losses"][step]) < 1e-5


@pytest.mark.parametrize(
    "lost", ["optimizer/model.decoder.layers.0.fc1.u/exp_avg", "bank/model.decoder.layers.0.fc1/u"]
)
def test_a_lost_tensor_would_show(lost: str, corpus: Path, tmp_path: Path) -> None:
    """The twin: a resume that leaves out one moment, or one part of the bank, is not bit-exact."""
    config = tiny_config(corpus, tmp_path / "a", train__steps=STEPS)
    straight = run_distributed(train_tiny, 1, config)[0]
    broken = tiny_config(corpus, tmp_path / "b", train__steps=STEPS)
    run_distributed(train_tiny, 1, broken, 6)
    resumed = run_distributed(resume_without, 1, broken, lost)[0]
    assert any(resumed["losses"][s] != straight["losses"][s] for s in resumed["losses"])


def resume_without(config: Any, lost: str) -> dict[str, Any]:
    """Resume with one tensor of the checkpoint read as zeros."""
    from spectral_scale.checkpoint.reader import CheckpointReader

    read = CheckpointReader.read

    def forgetful(reader: CheckpointReader, name: str, *args: Any, **kwargs: Any) -> Any:
        tensor = read(reader, name, *args, **kwargs)
        return tensor.zero_() if name == lost else tensor

    CheckpointReader.read = forgetful  # type: ignore[method-assign]
    return train_tiny(config)


def assert_same_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    different = [n for n, value in expected.items() if not np.array_equal(found[n], value)]
    assert not different
