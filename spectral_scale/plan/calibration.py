"""Rates from a measurement: the JSON of `bench step`, or of a `bench` check of `doctor --gpu`.

The rates of products and of memory are those with which the formulas of `plan.step_time` agree best
with the passes of every variant that was measured, and with the update of the dense one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectral_scale.config.presets import PRESETS, linear_shapes
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.config.schema import ModelConfig, RunConfig, SpectralConfig, TrainConfig
from spectral_scale.errors import ConfigError
from spectral_scale.files.json_text import parse_json
from spectral_scale.metrics.flops import peak_flops
from spectral_scale.plan.gpus import DECOMPOSITION_RATE, LAUNCH_SECONDS, Gpu, Rates
from spectral_scale.plan.inventory import Inventory, take_inventory
from spectral_scale.plan.step_time import PassCosts, pass_costs

VARIANTS: Mapping[str, Mapping[str, str]] = {
    "dense": {"method": "full"},
    "sst residual": {"storage": "residual"},
    "sst factored": {"storage": "factored"},
}
"""Variants of `bench step` that are compared -> settings of the spectral section."""
UPDATE_BYTES = 32
"""Bytes that clipping and AdamW move for an element: see `plan.step_time.update_seconds`."""
REQUIRED = (
    "write one with `spectral-scale bench step --format json --output FILE` on the machine, or "
    "give results/bench-125m.json of `doctor --gpu`"
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured rates, and the device that they were measured on."""

    device: Gpu
    """Its data sheet; a processor's has the memory of the machine."""
    rates: Rates
    precision: str
    """Precision of the measured products."""
    error: float
    """Largest relative error of the fitted passes."""


def read_calibration(path: Path, gpu: Gpu | None, precision: str) -> Calibration:
    """The rates of a file for a run. Raises ConfigError for a file that does not fit it.

    Args:
        path: the file.
        gpu: what `--gpu` gave; None for a measurement on a processor.
        precision: `train.precision` of the run.
    """
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibration {path} cannot be read ({error}); {REQUIRED}") from None
    bench = raw.get("data") or raw if isinstance(raw, dict) else {}
    try:
        found = calibrate(bench, gpu, source=path.name)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"--calibration {path} is no measurement of a step ({type(error).__name__}: {error}); "
            f"{REQUIRED}"
        ) from None
    if found.precision != precision:
        raise ConfigError(
            f"--calibration {path} was measured in {found.precision}, and train.precision is "
            f"{precision}; measure with --dtype {precision}, or change the run"
        )
    return found


def calibrate(bench: Mapping[str, Any], gpu: Gpu | None, *, source: str) -> Calibration:
    """The rates of a measurement. Raises ConfigError if `gpu` is another device than it names, and
    KeyError, TypeError or ValueError if it is none."""
    settings, machine = bench["settings"], bench["machine"]
    results = {r["variant"]: r for r in bench["results"] if r["variant"] in VARIANTS}
    runs = {variant: _run(bench, variant) for variant in results}
    whole = bool(settings["whole_model"])
    costs, measured = [], []
    for variant, result in results.items():
        costs.append(pass_costs(*runs[variant], blocks_alone=not whole))
        phases = result["phase_seconds"]
        measured.append(phases["forward"]["median"] + phases["backward"]["median"])
    trained = runs["dense"][1].numel(trainable=True, in_blocks=None if whole else True)
    update = results["dense"]["phase_seconds"]["optimizer"]["median"]
    products, memory = fit(costs, measured, UPDATE_BYTES * trained, update)
    exact, decompositions = _swap_rates(bench, results, products)
    device = _device(machine, gpu, memory)
    rates = Rates(
        products=products,
        exact_products=exact,
        memory=memory,
        decompositions=decompositions,
        launch_seconds=LAUNCH_SECONDS,
        peak=None if machine["gpu"] is None else peak_flops(machine["gpu"], settings["dtype"]),
        source=source,
    )
    wrong = [abs(c.seconds(rates) / t - 1) for c, t in zip(costs, measured, strict=True)]
    return Calibration(device=device, rates=rates, precision=settings["dtype"], error=max(wrong))


def _run(bench: Mapping[str, Any], variant: str) -> tuple[ResolvedRun, Inventory]:
    """The run whose step was measured; its model has the blocks that were."""
    settings = bench["settings"]
    name, length = settings["model"], settings["sequence_length"]
    if name not in PRESETS:
        raise ValueError(f"its model {name} is no preset")
    model = ModelConfig(name=name, sequence_length=length, num_layers=bench["blocks"])
    spectral: dict[str, Any] = {"spectral_rank": settings["spectral_rank"], **VARIANTS[variant]}
    batch = settings["batch_size"]
    config = RunConfig(
        model=model,
        spectral=SpectralConfig(**spectral),
        train=TrainConfig(
            precision=settings["dtype"], global_batch_size=batch, micro_batch_size=batch
        ),
    )
    run = resolve(config, world_size=1)
    return run, take_inventory(run.config, run.architecture, run.method)


def fit(
    costs: Sequence[PassCosts], measured: Sequence[float], update_bytes: float, update: float
) -> tuple[float, float]:
    """Rates of products and memory by least squares of the logarithms of predicted over measured
    seconds: a grid that is refined around its best point."""
    base = Rates(
        products=1.0, exact_products=1.0, memory=1.0, decompositions=1.0,
        launch_seconds=0.0, peak=None, source="",
    )  # fmt: skip

    def wrong(products: float, memory: float) -> float:
        rates = replace(base, products=products, exact_products=products, memory=memory)
        ratios = [c.seconds(rates) / t for c, t in zip(costs, measured, strict=True)]
        # The update counts little: it may be faster than other operations that memory limits.
        last = 0.1 * math.log(update_bytes / memory / update) ** 2
        return sum(math.log(ratio) ** 2 for ratio in ratios) + last

    flops = sum(f for f, _ in costs[0].products) / measured[0]
    best, width = (flops, update_bytes / update), 3.0
    for _ in range(12):
        grid = [math.exp(width * step / 4) for step in range(-4, 5)]
        points = [(best[0] * a, best[1] * b) for a in grid for b in grid]
        best = min(points, key=lambda point: wrong(*point))
        width /= 2
    return best


def _swap_rates(
    bench: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], products: float
) -> tuple[float, float]:
    """Rates of rebuilt weights and of decompositions by the residual variant's swaps; without them
    the rate of products, and the assumed one."""
    boundary = results.get("sst residual", {}).get("boundary")
    if not boundary:
        return products, DECOMPOSITION_RATE
    shapes = [*linear_shapes(PRESETS[bench["settings"]["model"]]).values()] * bench["blocks"]
    rebuilt = sum(2 * m * n * min(m, n) for m, n in shapes)
    work = sum(max(shape) * min(shape) ** 2 for shape in shapes)
    swap, again = boundary["swap_seconds"], boundary["redecompose_seconds"]
    return rebuilt / swap, work / max(again - swap, 1e-9)


def _device(machine: Mapping[str, Any], gpu: Gpu | None, memory_rate: float) -> Gpu:
    """The device of a measurement. Raises ConfigError if it is not the one that was asked for."""
    name = machine["gpu"]
    if gpu is None and name is not None:
        raise ConfigError(f"the calibration was measured on {name}; name its kind with --gpu")
    if gpu is not None and gpu.name.split("-")[0].upper() not in str(name).upper():
        raise ConfigError(
            f"the calibration was measured on {name or machine['cpu']}, and --gpu is {gpu.name}; "
            "measure on the GPU that you ask for, or leave one of them out"
        )
    if gpu is not None:
        return gpu
    return Gpu(
        name="cpu",
        device_name=machine["cpu"],
        memory_bytes=machine["memory_bytes"],
        memory_rate=memory_rate,
        link_rate=memory_rate / 4,
        watts=250,
    )
