"""Synthetic run folders with the keys a run logs, written through the real log."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectral_scale.metrics import MetricsLog, plots

KINDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
Values = dict[str, Any]


def loss_at(step: int, seed: int) -> float:
    """A falling curve with noise that depends on the step and the seed alone."""
    noise = math.sin(12.9898 * step + 78.233 * seed) * 43758.5453 % 1.0 - 0.5
    return 3.2 + 0.1 * seed + 5.8 * math.exp(-step / 260) + 0.25 * noise


def line_at(step: int, seed: int) -> Values:
    """Everything a run logs at one step."""
    rate = 1e-3 * min(1.0, (step + 1) / 100)
    ramp = min(1.0, (step % 200 + 1) / 20)
    norm = 1.1 + 3 * math.exp(-step / 100) + 0.2 * math.sin(step)
    values: Values = {
        "train/loss": loss_at(step, seed),
        "train/tokens": step * 8192,
        "train/lr": rate,
        "train/grad_norm": norm,
        "train/step_seconds": 0.31 + 0.02 * math.sin(step * 1.7) + 0.09 * (step % 200 == 0),
        "train/tokens_per_second": 26000 + 900 * math.sin(step * 1.7),
        "memory/weights_bytes": 18_300_000,
        "memory/gradients_bytes": 6_100_000,
        "memory/states_bytes": 12_200_000,
        "memory/bank_bytes": 25_400_000,
        "memory/peak_bytes": 712_000_000 + step * 100,
        "spectral/orthogonality_error": 3e-7 * (1 + step % 200),
    }
    for factor, group in enumerate(("dense", "spectral_direction", "spectral_value"), start=1):
        values[f"train/lr/{group}"] = rate if group == "dense" else rate * ramp
        values[f"train/grad_norm/{group}"] = norm / (factor + 1)
    if step % 200 == 0:
        values |= boundary_at(step)
    return values


def boundary_at(step: int) -> Values:
    """What a run logs at a swap."""
    values: Values = {"validation/loss": loss_at(step, 0) + 0.1}
    values["validation/perplexity"] = math.exp(values["validation/loss"])
    if step:
        values |= {"spectral/boundary_seconds": 0.9, "spectral/swapped_vectors": 24 * 16}
        values |= {"spectral/moments_reset": 24 * 3, "spectral/layers": 24}
        values |= {"spectral/active_triplets": 24 * 16}
    for place, kind in enumerate(KINDS):
        values[f"spectral/effective_rank/{kind}"] = (
            180 - place * 6 - 40 * (1 - math.exp(-step / 500))
        )
        growth = 1 + step / 1000
        values[f"spectral/spectrum/{kind}"] = [
            growth * 2.2 * math.exp(-3.5 * q / 32) + 0.02 for q in range(33)
        ]
    return values


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder; `kills` are (last logged step, resumed from step)."""

    def make(
        name: str = "first",
        *,
        steps: int = 1000,
        interval: int = 10,
        kills: tuple[tuple[int, int], ...] = (),
        seed: int = 0,
        fingerprint: str | None = "sha256:aa",
        change: Callable[[int, int, Values], Values] = lambda attempt, step, values: values,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        begins = [None, *(resume for _, resume in kills)]
        ends = [*(last for last, _ in kills), steps]
        for attempt, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            log = MetricsLog(folder, tensorboard=False, resume_step=begin)
            first = 0 if begin is None else begin + interval
            for step in range(first, end + 1, interval):
                log.write(step, change(attempt, step, line_at(step, seed)))
            if end == steps:
                log.write(end, {"event": "done"})
            log.close()
        spread_times(folder)
        environment: Values = {"versions": {"torch": "2.13.0"}, "device": "cpu", "world_size": 1}
        environment |= {"parameters_trained": 1_234_567, "parameters_dense": 4_567_890}
        if fingerprint is not None:
            environment["data_fingerprint"] = fingerprint
        (folder / "environment.json").write_text(json.dumps(environment))
        (folder / "config.yaml").write_text(yaml.safe_dump(settings(steps, seed)))
        return folder

    return make


@pytest.fixture
def quick_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build every chart but skip its slow part, the layout; `False` as parameter: draw it all."""
    if getattr(request, "param", True):
        monkeypatch.setattr(plots, "_to_uri", lambda figure: "data:image/svg+xml;base64,")


def settings(steps: int, seed: int) -> dict[str, Any]:
    return {
        "model": {"name": "opt-tiny", "sequence_length": 256, "path": None},
        "spectral": {"method": "sst", "storage": "residual", "spectral_rank": 16},
        "optimizer": {"lr": 1e-3, "spectral_lr": 1e-3, "betas": [0.9, 0.95]},
        "data": {"train": "prepared/train", "validation": "prepared/valid"},
        "train": {"steps": steps, "seed": seed, "precision": "fp32"},
        "checkpoint": {"interval": 200, "keep_last": 2},
    }


def spread_times(folder: Path) -> None:
    """Give each line a time a third of a second after the one before, as a run would have."""
    path = folder / "metrics.jsonl"
    begin = time.time() - 5000
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["time"] = round(begin + 3.3 * number, 3)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
