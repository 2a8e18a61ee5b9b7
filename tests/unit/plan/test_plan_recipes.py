"""The layouts of slurm/README.md are what the plan says."""

from pathlib import Path

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.plan.build import plan_run

TEXT = (Path(__file__).parents[3] / "slurm" / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| opt-")
]
CHECKED = [
    row for row in ROWS if row[0] in ("opt-125m", "opt-1.3b") or row[::2][:2] == ["opt-6.7b", "2"]
]


def test_every_model_has_its_three_layouts() -> None:
    assert len(ROWS) == 18 and {row[2] for row in ROWS} == {"1", "2", "8"}
    assert len(CHECKED) == 7


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: f"{row[0]} on {row[2]}")
def test_a_row(row: list[str]) -> None:
    model, rank, nodes, parallel, recompute, micro, accumulate, *computed = row
    values = {
        "model.name": model,
        "model.sequence_length": 2048,
        "model.activation_checkpointing": str(recompute == "yes").lower(),
        "spectral.spectral_rank": rank,
        "train.precision": "bf16",
        "train.global_batch_size": 512,
        "train.micro_batch_size": micro,
        "parallel.backend": "fsdp2" if "fsdp2" in parallel else "torch",
        "parallel.residual": "replicated" if "replicated" in parallel else "auto",
        "parallel.shard_group": 8 if "shard_group 8" in parallel else "auto",
    }
    config = load_config([], [f"--{key}={value}" for key, value in values.items()]).config
    plan = plan_run(resolve(config, world_size=8 * int(nodes)), gpu_memory_bytes=80e9)
    assert plan.gradient_accumulation_steps == int(accumulate)
    found = [
        f"{plan.peak_bytes / 1e9:.1f}",
        f"{plan.step_traffic_bytes / 1e9:.2f}",
        f"{plan.boundary_traffic_bytes / 1e9:.2f}",
    ]
    assert found == [cell.removesuffix(" (tight)") for cell in computed]
    assert plan.verdict == ("tight" if "tight" in computed[0] else "fits")
