"""Interleaves the steps of several subjects, so that machine drift affects all equally."""

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median

from spectral_scale.bench.subject import Subject
from spectral_scale.metrics.measures import StepTimer

PHASES = ("forward", "backward", "optimizer")
SWAPS = 3
"""Timed swaps of a kind."""

Notify = Callable[[str], None]
Sample = dict[str, float]
"""Seconds of one step or swap: `step` in all, `cpu` of this process, and a step's phases."""


def warm_up(subject: Subject, steps: int) -> dict[str, int]:
    """Take untimed steps; the state's bytes, counted while gradients exist."""
    timer = StepTimer()
    for _ in range(steps):
        subject.step(timer)
    subject.forward_backward(timer)
    counted = subject.state_bytes()
    subject.optimizer.zero_grad(set_to_none=True)
    return counted


def interleave(subjects: Sequence[Subject], rounds: int, notify: Notify) -> dict[str, list[Sample]]:
    """Each round takes one step of every subject, starting with the next one: ABC, BCA, CAB."""
    samples: dict[str, list[Sample]] = {subject.variant: [] for subject in subjects}
    for i in range(rounds):
        first = i % len(subjects)
        for subject in [*subjects[first:], *subjects[:first]]:
            samples[subject.variant].append(_timed_step(subject))
        steps = ", ".join(f"{name} {taken[-1]['step']:.3f} s" for name, taken in samples.items())
        notify(f"round {i + 1} of {rounds}: {steps}")
    return samples


def _timed_step(subject: Subject) -> Sample:
    gc.collect()
    timer = StepTimer(subject.synchronize)
    begin = time.process_time()
    subject.step(timer)
    cpu = time.process_time() - begin
    phases = timer.take()
    return {**phases, "step": sum(phases.values()), "cpu": cpu}


def time_swaps(subject: Subject, iterations_per_round: int) -> tuple[Sample, Sample]:
    """Time swaps without decomposition (medians), and one that ends the round of every matrix.

    Both are given as `step` and `cpu` seconds. With one iteration in a round they are the same, and
    medians.
    """
    t2 = iterations_per_round
    ends = _timed_swap(subject, t2)
    if t2 == 1:
        all_end = [ends, *(_timed_swap(subject, i + 1) for i in range(1, SWAPS))]
        both = {key: median(swap[key] for swap in all_end) for key in ends}
        return both, both
    swaps = [_timed_swap(subject, t2 * (i + 1) + 1) for i in range(SWAPS)]
    return {key: median(swap[key] for swap in swaps) for key in ends}, ends


def _timed_swap(subject: Subject, iteration: int) -> Sample:
    gc.collect()
    timer = StepTimer(subject.synchronize)
    begin = time.process_time()
    subject.swap(timer, iteration=iteration)
    return {"step": timer.take()["swap"], "cpu": time.process_time() - begin}
