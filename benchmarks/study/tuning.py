"""The tuning rule: which learning rate to try next. Every variant has the same number of tries."""

from collections.abc import Mapping

from study.settings import TUNING_RUNS

FACTOR = 2.0


def next_rate(
    losses: Mapping[float, float], first: float, *, most: int = TUNING_RUNS
) -> float | None:
    """The next learning rate to try after those in `losses` (rate -> validation loss), or None.

    First the given one and twice it, then beyond the better one: a factor of 2 up from the largest
    tried or down from the smallest. A run that diverged has an infinite loss. None when the budget
    of TUNING_RUNS is spent; while the best rate then lies at the edge of what was tried, up to
    `most` runs go on beyond it.
    """
    if len(losses) >= (TUNING_RUNS if not losses or not at_edge(losses) else most):
        return None
    if not losses:
        return first
    if len(losses) == 1:
        return rounded(first * FACTOR)
    best = best_rate(losses)
    return rounded(max(losses) * FACTOR if best == max(losses) else min(losses) / FACTOR)


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
