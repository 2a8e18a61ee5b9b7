"""What a run takes on a cluster: time of a step and of the run, GPU-hours, saves, energy. No torch
beyond the inventory's."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.metrics.flops import model_flops_per_token, model_flops_utilization
from spectral_scale.plan.build import Plan, plan_inventory
from spectral_scale.plan.gpus import Cluster, Rates, rate_assumptions
from spectral_scale.plan.inventory import Inventory
from spectral_scale.plan.links import HIDDEN
from spectral_scale.plan.memory import memory_of
from spectral_scale.plan.step_time import STEP_ASSUMPTIONS, StepSeconds, step_seconds

GPU_HOURS_BETWEEN_FAILURES = 7680.0
"""GPU-hours between failures, an assumption: one interruption in 7.5 hours on 1,024 GPUs."""
SAVE_RATE, LARGEST_SAVE_RATE = 1e9, 20e9
"""Bytes a second at which a node writes, and all nodes together."""
RESTART_SECONDS = 600.0
"""From a failure to the first new step."""
POWER_OF_THE_REST = 1.5
"""Power of the machine room over that of its GPUs: processors, network, cooling."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Computed from rates, not measured."""

    gpu: str
    nodes: int
    gpus_per_node: int
    rates: str
    """Where the rates come from: `assumed`, or the file that they were measured in."""
    step_seconds: float
    """An optimizer step, swaps spread over all steps."""
    parts: dict[str, float]
    """Part of a step -> seconds: passes, optimizer, waiting, swap."""
    swap_seconds: float
    """One swap, merge or renewal; 0: there are none."""
    swap_share: float
    """The share of the time that swaps take."""
    tokens_per_second: float
    """Over all ranks."""
    flops_per_token: int
    mfu: float | None
    """Model FLOPs utilization; None where the peak is not known."""
    hours: float
    """Time of all steps and saves, without failures."""
    gpu_hours: float
    """The same over all GPUs."""
    save_seconds: float
    """One checkpoint."""
    save_every_steps: int
    """The interval by Young and Daly for the failures that are assumed."""
    expected_hours: float
    """Time with failures: saves at that interval, lost work and restarts."""
    kilowatt_hours: float
    """Energy of the expected hours."""
    assumptions: tuple[str, ...]


def estimate_run(
    run: ResolvedRun, plan: Plan, inventory: Inventory, rates: Rates, cluster: Cluster
) -> Estimate:
    """The estimate of a run whose plan is known, on all ranks of a cluster."""
    config, a = run.config, run.architecture
    seconds = step_seconds(run, inventory, memory_of(run, inventory), rates, cluster)
    flops = model_flops_per_token(
        inventory.products,
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        sequence_length=config.model.sequence_length,
    )
    speed = plan.tokens_per_step / seconds.step
    saving = plan.checkpoint_bytes / min(SAVE_RATE * cluster.nodes, LARGEST_SAVE_RATE)
    between = 3600 * GPU_HOURS_BETWEEN_FAILURES / cluster.world_size
    every = save_interval_seconds(saving, between)
    training = config.train.steps * seconds.step
    saves = math.ceil(config.train.steps / config.checkpoint.interval)
    hours = (training + saves * saving) / 3600
    expected = expected_seconds(training, saving, every, between) / 3600
    peak = None if rates.peak is None else rates.peak * cluster.world_size
    return Estimate(
        gpu=cluster.gpu.name,
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        rates=rates.source,
        step_seconds=seconds.step,
        parts=_parts(seconds),
        swap_seconds=seconds.swap,
        swap_share=seconds.swap_share,
        tokens_per_second=speed,
        flops_per_token=flops,
        mfu=model_flops_utilization(
            flops_per_token=flops, tokens_per_second=speed, peak_flops_per_second=peak
        ),
        hours=hours,
        gpu_hours=hours * cluster.world_size,
        save_seconds=saving,
        save_every_steps=max(1, round(every / seconds.step)),
        expected_hours=expected,
        kilowatt_hours=expected * cluster.world_size * cluster.gpu.watts * POWER_OF_THE_REST / 1e3,
        assumptions=(*rate_assumptions(rates, cluster), *STEP_ASSUMPTIONS, *_ASSUMED),
    )


_ASSUMED = (
    f"messages that a backend overlaps are free in {HIDDEN:.0%} of the passes' time",
    f"saves: {SAVE_RATE / 1e9:.0f} GB/s a node, at most {LARGEST_SAVE_RATE / 1e9:.0f}; a failure "
    f"every {GPU_HOURS_BETWEEN_FAILURES:,.0f} GPU-hours, {RESTART_SECONDS / 60:.0f} minutes to "
    "start again",
    f"energy: the largest power of the boards, times {POWER_OF_THE_REST} for all else",
)


def estimate_config(
    run: ResolvedRun, rates: Rates, cluster: Cluster, *, gpu_memory_bytes: float
) -> tuple[Plan, Estimate]:
    """Plan and estimate of a run. Raises ConfigError if its data does not fit it."""
    run, plan, inventory = plan_inventory(run, gpu_memory_bytes=gpu_memory_bytes)
    return plan, estimate_run(run, plan, inventory, rates, cluster)


def save_interval_seconds(saving: float, between_failures: float) -> float:
    """sqrt(2 C M) - C, the interval between saves of C seconds that loses least time to failures
    every M seconds; M where a save takes more than half of that (Daly 2006, equation 20)."""
    if saving >= between_failures / 2:
        return between_failures
    return math.sqrt(2 * saving * between_failures) - saving


def expected_seconds(
    training: float, saving: float, interval: float, between_failures: float
) -> float:
    """Time of a run with its saves, and for each failure half an interval's work and a restart."""
    saved = training * (1 + saving / interval)
    lost = (interval / 2 + RESTART_SECONDS) / between_failures
    return saved * (1 + lost)


def _parts(seconds: StepSeconds) -> dict[str, float]:
    return {
        "passes": seconds.passes,
        "optimizer": seconds.optimizer,
        "waiting": seconds.waiting,
        "swap": seconds.swap_a_step,
    }


def to_json(estimate: Estimate) -> dict[str, Any]:
    """Plain values, for --format json."""
    return asdict(estimate) | {"assumptions": list(estimate.assumptions)}


PARTS = {
    "passes": "forward and backward passes",
    "optimizer": "clipping and update",
    "waiting": "messages that are waited for",
    "swap": "swaps, spread over all steps",
}


def as_text(estimate: Estimate, *, energy: bool) -> str:
    """The estimate as lines for a terminal."""
    e = estimate
    mfu = "" if e.mfu is None else f", MFU {e.mfu:.1%}"
    lines = [
        f"  estimated on {e.nodes} x {e.gpus_per_node} {e.gpu} (rates: {e.rates}):",
        f"    {'an optimizer step':<40}{e.step_seconds:9.3f} s",
        *(f"      {PARTS[part]:<38}{seconds:9.3f} s" for part, seconds in e.parts.items()),
        f"    {e.tokens_per_second:,.0f} tokens a second{mfu}",
        f"    {e.hours:,.1f} hours, {e.gpu_hours:,.0f} GPU-hours; with failures "
        f"{e.expected_hours:,.1f} hours",
        f"    a save takes {e.save_seconds:.1f} s; save every {e.save_every_steps:,} steps "
        "(checkpoint.interval)",
    ]
    if e.swap_seconds:
        lines.insert(-2, f"    a swap takes {e.swap_seconds:.2f} s, {e.swap_share:.2%} of the time")
    if energy:
        lines.append(f"    {e.kilowatt_hours:,.0f} kWh")
    return "\n".join(lines + [f"  assumed: {text}" for text in e.assumptions])
