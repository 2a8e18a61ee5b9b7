"""The tuning rule: equal budgets, towards the minimum, honest about edges."""

import math

import pytest
from study.settings import TUNING_RUNS
from study.tuning import at_edge, best_rate, next_rate


def tuned(loss, first: float = 2e-3) -> dict[float, float]:
    losses: dict[float, float] = {}
    while (rate := next_rate(losses, first)) is not None:
        losses[rate] = loss(rate)
    return losses


def parabola(best: float):
    return lambda rate: 5.0 + math.log2(rate / best) ** 2


@pytest.mark.parametrize("best", [1e-5, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 8e-3, 1.0])
def test_every_variant_gets_the_same_number_of_tries(best):
    losses = tuned(parabola(best))
    assert len(losses) == TUNING_RUNS
    assert list(losses)[:2] == [2e-3, 4e-3]


@pytest.mark.parametrize("best, expected", [(1e-3, 1e-3), (2e-3, 2e-3), (4e-3, 4e-3), (8e-3, 8e-3)])
def test_the_minimum_is_found(best, expected):
    assert best_rate(tuned(parabola(best))) == expected


def test_the_third_try_lies_beyond_the_better_of_the_first_two():
    assert list(tuned(parabola(9e-3)))[2] == 8e-3
    assert list(tuned(parabola(3e-4)))[2] == 1e-3


def test_an_edge_is_said():
    assert at_edge(tuned(parabola(1.0)))
    assert not at_edge(tuned(parabola(2e-3)))


def test_a_diverged_rate_is_never_chosen():
    losses = tuned(lambda rate: math.inf if rate > 1e-3 else 5.0)
    assert best_rate(losses) <= 1e-3
    assert len(losses) == TUNING_RUNS
