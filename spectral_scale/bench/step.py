"""Dense AdamW and every form of SST in one run, by the parts of a step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spectral_scale.bench.machine import LoadWatch, describe_machine, load_warning
from spectral_scale.bench.memory import state_formula
from spectral_scale.bench.results import Spread, StepBench, SwapTimes, VariantResult
from spectral_scale.bench.sampling import (
    PHASES,
    Notify,
    Sample,
    interleave,
    time_swaps,
    warm_up,
)
from spectral_scale.bench.settings import (
    StepSettings,
    Variant,
    architecture_of,
    num_blocks,
)
from spectral_scale.bench.subject import Subject
from spectral_scale.bench.workload import build_on_meta, make_workload
from spectral_scale.config.presets import Architecture, linear_shapes
from spectral_scale.parallel.device import pick_device


def bench_step(settings: StepSettings, notify: Notify = lambda _: None) -> StepBench:
    """Measure a step of every variant on this machine.

    Args:
        settings: what to measure.
        notify: told what happens, a line at a time.

    Raises:
        ConfigError: settings that cannot run.
    """
    architecture = architecture_of(settings)
    device = pick_device(settings.device, 0)
    average = os.getloadavg()[0]
    with _threads(settings.threads):
        # All variants are built before the first timed step, so that their steps can take turns:
        # a machine that slows down then slows all of them.
        workload = make_workload(settings, architecture, device)
        subjects, counted = [], {}
        for variant in settings.variants:
            notify(f"building {variant}")
            subjects.append(Subject(settings, variant, architecture, workload))
            counted[variant] = warm_up(subjects[-1], settings.warmup_steps)
        load = LoadWatch()
        samples = interleave(subjects, settings.steps, notify)
        others = load.others()
        results = [
            _result(
                variant,
                samples,
                counted=counted[variant],
                formula=formula_of(settings, variant, architecture),
                boundary=_swap_times(subject, samples[variant], notify) if settings.swaps else None,
            )
            for variant, subject in zip(settings.variants, subjects, strict=True)
        ]
    return StepBench(
        machine=describe_machine(device),
        settings=settings,
        blocks=num_blocks(settings, architecture),
        load_average_at_start=average,
        load_average_at_end=os.getloadavg()[0],
        other_processors_busy=others,
        warning=load_warning(average_at_start=average, others=others, threads=settings.threads),
        results=results,
    )


def _result(
    variant: Variant,
    samples: dict[str, list[Sample]],
    *,
    counted: dict[str, int],
    formula: dict[str, int],
    boundary: SwapTimes | None,
) -> VariantResult:
    own, dense = samples[variant], samples["dense"]

    def spread(key: str) -> Spread:
        return Spread.of([sample[key] for sample in own])

    # Steps of the same round ran one after the other: their ratio shows no drift of the machine.
    def ratio(key: str) -> Spread:
        return Spread.of([a[key] / b[key] for a, b in zip(own, dense, strict=True)])

    return VariantResult(
        variant=variant,
        step_seconds=spread("step"),
        phase_seconds={phase: spread(phase) for phase in PHASES},
        cpu_seconds=spread("cpu"),
        step_ratio=ratio("step"),
        cpu_ratio=ratio("cpu"),
        state_bytes=counted,
        formula_bytes=formula,
        boundary=boundary,
    )


def _swap_times(subject: Subject, samples: list[Sample], notify: Notify) -> SwapTimes | None:
    """What swaps add to a step, spread over all steps of a round; None for dense AdamW.

    Every iteration ends with a swap, and one swap of each round decomposes the matrices again. If
    a swap takes 0.1 s, one with decompositions 2.1 s, and a round has 4 iterations of 50 steps, a
    step bears (0.1 + 2.0 / 4) / 50 = 0.012 s: 2 % of a step of 0.6 s.
    """
    if subject.controller is None:
        return None
    notify(f"swaps of {subject.variant}")
    schedule = subject.controller.schedule
    swap, ends = time_swaps(subject, schedule.iterations_per_round)

    def amortised(key: str) -> float:
        every_round = (ends[key] - swap[key]) / schedule.iterations_per_round
        return (swap[key] + every_round) / schedule.steps_per_iteration

    def share(key: str) -> float:
        return amortised(key) / Spread.of([sample[key] for sample in samples]).median

    return SwapTimes(
        swap_seconds=swap["step"],
        redecompose_seconds=ends["step"],
        iterations_per_round=schedule.iterations_per_round,
        amortised_seconds=amortised("step"),
        share_of_step=share("step"),
        cpu_share_of_step=share("cpu"),
    )


def formula_of(
    settings: StepSettings, variant: Variant, architecture: Architecture
) -> dict[str, int]:
    """Expected bytes; the elements besides the blocks' matrices are those of the dense model."""
    blocks = num_blocks(settings, architecture)
    matrices = [*linear_shapes(architecture).values()] * blocks
    total = sum(p.numel() for p in build_on_meta(settings, architecture).parameters())
    return state_formula(
        variant,
        matrices,
        other_elements=total - sum(m * n for m, n in matrices),
        spectral_rank=settings.spectral_rank,
        frozen_bytes=2 if settings.dtype == "bf16" else 4,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
