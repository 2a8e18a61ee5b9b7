"""A run's loss along the three axes: tokens, processor time, bytes of training state."""

from collections.abc import Mapping, Sequence

from study.results import Result
from study.settings import Variant

from study2 import settings as declared
from study2.plan import final_name

Curve = list[tuple[float, float]]
"""(place on an axis, validation loss), in ascending order."""


def finals(results: Mapping[str, Result], variant: Variant) -> list[Result]:
    """The finished runs to the end of a variant, by seed."""
    names = (final_name(variant, seed) for seed in variant.seeds)
    return [results[name] for name in names if name in results]


def complete(results: Mapping[str, Result], variant: Variant) -> list[Result]:
    """The same, or none until every seed is done; what is claimed rests on all of them."""
    found = finals(results, variant)
    return found if len(found) == len(variant.seeds) else []


def over_tokens(run: Result) -> Curve:
    """Loss after so many tokens."""
    return [(step * declared.TOKENS_PER_STEP, loss) for step, loss in run.validation]


def over_seconds(run: Result) -> Curve:
    """Loss after so many processor seconds of steps, evaluations and saves left out."""
    seconds = {step: spent for step, _, spent, _ in run.costs}
    return [(seconds[step], loss) for step, loss in run.validation if step in seconds]


def state_bytes(run: Result) -> int | None:
    """Weights, gradients, moments and what owners keep, at the last evaluation."""
    return run.costs[-1][3] if run.costs else None


def seconds_per_step(run: Result) -> float | None:
    """Processor seconds of a step on average, swaps included."""
    return run.costs[-1][2] / run.costs[-1][0] if run.costs and run.costs[-1][0] else None


def at(curve: Curve, place: float) -> float | None:
    """The loss at a place, by a straight line between evaluations; None outside of them."""
    for (left, before), (right, after) in zip(curve, curve[1:], strict=False):
        if left <= place <= right:
            return before + (after - before) * (place - left) / max(right - left, 1e-12)
    return None


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if there is none, or one of them is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def mean_loss(results: Mapping[str, Result], variant: Variant) -> float | None:
    """Mean final loss over the variant's seeds; None until every one is done."""
    return mean([run.loss for run in complete(results, variant)])
