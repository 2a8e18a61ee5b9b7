"""Rates are read from measurements: those that the formulas themselves would give come back."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.bench.settings import StepSettings, run_config
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import ConfigError
from spectral_scale.plan.calibration import UPDATE_BYTES, calibrate, read_calibration
from spectral_scale.plan.gpus import Rates, gpu_named
from spectral_scale.plan.inventory import take_inventory
from spectral_scale.plan.step_time import pass_costs

RATES = Rates(
    products=2e11, exact_products=1e11, memory=2e10, decompositions=4e9,
    launch_seconds=0.0, peak=None, source="",
)  # fmt: skip
SETTINGS = StepSettings(
    model="opt-125m", blocks=2, batch_size=2, variants=("dense", "sst residual")
)
SHAPES = ([(768, 768)] * 4 + [(3072, 768), (768, 3072)]) * 2


def bench(gpu: str | None = None, **rates: float) -> dict[str, Any]:
    """What `bench step` would write on a machine of these rates."""
    results = []
    for variant in SETTINGS.variants:
        config = run_config(SETTINGS, variant)
        run = resolve(config, world_size=1)
        inventory = take_inventory(config, run.architecture)
        costs = pass_costs(run, inventory, blocks_alone=True)
        # The formulas of the whole model's blocks, of which two are measured.
        share = 2 / run.architecture.num_layers
        passes = costs.seconds(RATES) * share
        trained = inventory.numel(trainable=True, in_blocks=True) * share
        update = UPDATE_BYTES * trained / RATES.memory
        phases = {"forward": passes / 3, "backward": 2 * passes / 3, "optimizer": update}
        boundary = None
        if variant != "dense":
            swap = sum(2 * m * n * min(m, n) for m, n in SHAPES) / RATES.exact_products
            work = sum(max(s) * min(s) ** 2 for s in SHAPES) / RATES.decompositions
            boundary = {"swap_seconds": swap, "redecompose_seconds": swap + work}
        results.append(
            {
                "variant": variant,
                "phase_seconds": {name: {"median": value} for name, value in phases.items()},
                "boundary": boundary,
            }
        )
    settings = {
        "model": "opt-125m", "whole_model": False, "sequence_length": 512, "batch_size": 2,
        "dtype": "fp32", "spectral_rank": 64,
    }  # fmt: skip
    machine = {"gpu": gpu, "cpu": "a processor", "memory_bytes": 24e9}
    return {"settings": settings, "machine": machine, "blocks": 2, "results": results}


def test_the_rates_come_back() -> None:
    found = calibrate(bench(), None, source="step.json")
    assert found.rates.products == pytest.approx(RATES.products, rel=0.02)
    assert found.rates.memory == pytest.approx(RATES.memory, rel=0.02)
    assert found.rates.exact_products == pytest.approx(RATES.exact_products)
    assert found.rates.decompositions == pytest.approx(RATES.decompositions)
    assert found.error < 0.01 and found.device.name == "cpu" and found.rates.peak is None


def test_a_file_of_bench_step_and_of_doctor(tmp_path: Path) -> None:
    plain, check = tmp_path / "step.json", tmp_path / "check.json"
    measured = bench("NVIDIA H100 80GB HBM3")
    plain.write_text(json.dumps(measured))
    check.write_text(json.dumps({"name": "bench-125m", "verdict": "pass", "data": measured}))
    one, two = (read_calibration(f, gpu_named("h100"), "fp32") for f in (plain, check))
    assert one.rates.products == two.rates.products
    assert one.rates.source == "step.json" and one.rates.peak == 67e12


@pytest.mark.parametrize(
    ("content", "gpu", "precision", "message"),
    [
        ("{}", None, "fp32", "no measurement of a step"),
        ("[1]", None, "fp32", "no measurement of a step"),
        ("nothing", None, "fp32", "cannot be read"),
        (None, "a100-80gb", "fp32", "measured on a processor, and --gpu is a100-80gb"),
        (None, None, "bf16", "measured in fp32, and train.precision is bf16"),
    ],
)
def test_files_that_do_not_fit(
    content: str | None, gpu: str | None, precision: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "step.json"
    file.write_text(json.dumps(bench()) if content is None else content)
    with pytest.raises(ConfigError, match=message):
        read_calibration(file, None if gpu is None else gpu_named(gpu), precision)


def test_a_gpu_must_be_named() -> None:
    with pytest.raises(ConfigError, match="name its kind with --gpu"):
        calibrate(bench("NVIDIA A100-SXM4-80GB"), None, source="")
    with pytest.raises(ConfigError, match="--gpu is h100"):
        calibrate(bench("NVIDIA A100-SXM4-80GB"), gpu_named("h100"), source="")
