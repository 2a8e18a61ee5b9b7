"""The tuning rule: which learning rate to try next. Every variant has the same number of tries."""

import math
from collections.abc import Mapping

from study.settings import TUNING_RUNS

FACTOR = 2.0


def next_rate(losses: Mapping[float, float], first: float) -> float | None:
    """The next learning rate to try after those in `losses` (rate -> validation loss), or None.

    First the given one, twice it and half of it. Every later try goes next to the best so far: one
    factor of 2 beyond it while it is the largest or smallest tried, else halfway (in logarithm) to
    its better neighbour. A run that diverged has an infinite loss. None when the budget is spent.
    """
    if len(losses) >= TUNING_RUNS:
        return None
    for rate in (first, rounded(first * FACTOR), rounded(first / FACTOR)):
        if rate not in losses:
            return rate
    best = best_rate(losses)
    ordered = sorted(losses)
    if best == ordered[-1]:
        return rounded(best * FACTOR)
    if best == ordered[0]:
        return rounded(best / FACTOR)
    place = ordered.index(best)
    neighbour = min(ordered[place - 1], ordered[place + 1], key=losses.__getitem__)
    return rounded(math.sqrt(best * neighbour))


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss; the smaller one of equals."""
    return min(sorted(losses), key=losses.__getitem__)


def at_edge(losses: Mapping[float, float]) -> bool:
    """Whether the best rate is the smallest or largest tried, so that a better one may lie beyond.

    A neighbour that diverged bounds the range like any other.
    """
    return best_rate(losses) in (min(losses), max(losses))


def rounded(rate: float) -> float:
    """Three digits: what the names of the runs show is what was run."""
    return float(f"{rate:.3g}")
