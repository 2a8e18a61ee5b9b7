"""Every method through the real `train` command: exact resume, expected counts, honest sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.cli.main import main
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import TINY, tiny_config, train_tiny

STEPS = 10  # swaps after 4 and 8 steps


def train(corpus: Path, run_dir: Path, steps: int, **changes: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after a run of the command."""
    values = TINY | {
        "data.train": corpus / "train",
        "data.validation": corpus / "valid",
        "train.run_dir": run_dir,
        "train.steps": steps,
        "train.global_batch_size": 4,
        "metrics.progress": False,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    assert main(["train", *words]) == 0
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def values_of(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What must be equal: every value but times, rates and peaks of memory."""
    noise = ("second", "memory/peak", "mfu", "time", "attempt")
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        kept = {k: v for k, v in line.items() if not any(part in k for part in noise)}
        found.setdefault(line["step"], {}).update(kept)
    return found


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("full", "fp32"),
        ("sst", "bf16"),
        ("lora", "bf16"),
        ("relora", "fp32"),
        ("relora", "bf16"),
        ("galore", "fp32"),
    ],
)
def test_resume_equals_the_straight_run(
    corpus: Path, tmp_path: Path, method: str, precision: str
) -> None:
    """Stopped inside an interval, after a swap; a fresh build continues bit for bit."""
    changes = {"spectral__method": method, "train__precision": precision}
    straight = values_of(train(corpus, tmp_path / "straight", STEPS, **changes))
    train(corpus, tmp_path / "parts", 6, **changes)
    resumed = values_of(train(corpus, tmp_path / "parts", STEPS, **changes))
    assert [straight[s]["train/loss"] for s in range(1, STEPS + 1)] == [
        resumed[s]["train/loss"] for s in range(1, STEPS + 1)
    ]
    for step in range(7, STEPS + 1):
        assert resumed[step] == straight[step]
    assert straight[STEPS]["validation/loss"] < straight[0]["validation/loss"]


@pytest.mark.parametrize(("method", "stop"), [("relora", 8), ("galore", 4)])
def test_resume_exactly_at_a_swap(corpus: Path, tmp_path: Path, method: str, stop: int) -> None:
    changes = {"spectral__method": method, "train__precision": "bf16"}
    straight = values_of(train(corpus, tmp_path / "straight", STEPS, **changes))
    train(corpus, tmp_path / "parts", stop, **changes)
    resumed = values_of(train(corpus, tmp_path / "parts", STEPS, **changes))
    for step in range(stop + 1, STEPS + 1):
        assert resumed[step] == straight[step]


def test_the_runs_report_what_they_touched(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 2 blocks of 4 matrices 32 x 32 and fc1, fc2 of 128 x 32 and 32 x 128; r = 8.
    moments = 2 * 8 * 2 * (4 * (32 + 32) + 2 * (128 + 32))
    lines = values_of(train(corpus, tmp_path / "relora", STEPS, spectral__method="relora"))
    merges = {s: v for s, v in lines.items() if "relora/merge" in v}
    assert {s: v["relora/merge"] for s, v in merges.items()} == {4: 1, 8: 2}
    assert all(v["relora/layers"] == 12 for v in merges.values())
    assert all(v["relora/moments_reset"] == moments for v in merges.values())
    assert all(v["relora/relative_update"] > 0 for v in merges.values())
    rates = [lines[step]["train/lr/low_rank"] for step in range(3, 7)]
    assert rates == pytest.approx([1e-3, 1e-3, 0.5e-3, 1e-3])  # two steps of ramp after a merge
    output = capsys.readouterr().err
    assert "ReLoRA*: 12 matrices with factors of rank 8, scaling 1, merged every 4 steps" in output
    assert "without effect for spectral.method=relora: spectral.iterations_per_round" in output

    lines = values_of(train(corpus, tmp_path / "galore", STEPS, spectral__method="galore"))
    renewals = {s: v["galore/projections"] for s, v in lines.items() if "galore/projections" in v}
    assert renewals == {1: 12, 5: 12, 9: 12}
    assert "galore/subspace_overlap" not in lines[1]
    assert 0 < lines[5]["galore/subspace_overlap"] < 1
    assert "GaLore: gradients of 12 matrices projected to rank 8" in capsys.readouterr().err


def test_memory_says_where_it_is(corpus: Path, tmp_path: Path) -> None:
    """ReLoRA* keeps fp32 bases beside bf16 ones; LoRA does not; GaLore saves moments only."""
    lines = {
        method: values_of(
            train(corpus, tmp_path / method, 4, spectral__method=method, train__precision="bf16")
        )[4]
        for method in ("full", "lora", "relora", "galore")
    }
    matrices = 2 * (4 * 32 * 32 + 2 * 128 * 32)
    held = {method: line["memory/bank_bytes"] for method, line in lines.items()}
    assert held == {"full": 0, "lora": 0, "relora": 4 * matrices, "galore": 0}
    assert lines["lora"]["memory/weights_bytes"] == lines["relora"]["memory/weights_bytes"]
    assert lines["galore"]["memory/gradients_bytes"] == lines["full"]["memory/gradients_bytes"]
    # Per matrix: moments 2 r max(m, n) and projector r min(m, n), instead of 2 m n.
    saved = 2 * (4 * (2 * 32 * 32 - 3 * 8 * 32) + 2 * (2 * 128 * 32 - 8 * (2 * 128 + 32)))
    found = lines["full"]["memory/states_bytes"] - lines["galore"]["memory/states_bytes"]
    assert found == 4 * saved


@pytest.mark.parametrize("method", ["relora", "galore"])
def test_two_ranks_equal_one_process(corpus: Path, tmp_path: Path, method: str) -> None:
    changes = {"spectral__method": method, "train__steps": STEPS, "train__global_batch_size": 8}
    split = tiny_config(corpus, tmp_path / "two", train__micro_batch_size=4, **changes)
    whole = tiny_config(corpus, tmp_path / "one", train__micro_batch_size=8, **changes)
    first, second = run_distributed(train_tiny, 2, split)
    alone = run_distributed(train_tiny, 1, whole)[0]
    assert first["losses"].keys() == alone["losses"].keys()
    assert max(abs(first["losses"][s] - alone["losses"][s]) for s in alone["losses"]) < 1e-5
    bases = [{k for k in rank["tensors"] if k.startswith("base/")} for rank in (first, second)]
    assert len(bases[0] | bases[1]) == (12 if method == "relora" else 0)
    assert not bases[0] & bases[1]  # each base is saved by its owner alone
    assert set(alone["tensors"]) == set(first["tensors"]) | set(second["tensors"])
    for name, value in second["tensors"].items():
        if name.startswith("frozen/"):
            assert (value == first["tensors"][name]).all()
