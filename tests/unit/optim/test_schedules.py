"""Learning-rate schedules against closed forms, and without jumps."""

import math
from typing import Any

import pytest

from spectral_scale.config.schema import OptimizerConfig
from spectral_scale.optim.schedules import lr_factor

STEPS, WARMUP, FLOOR = 100, 20, 0.1


def factors(schedule: Any, **changes: Any) -> list[float]:
    values = {"warmup_steps": WARMUP, "min_lr_ratio": FLOOR} | changes
    config = OptimizerConfig(schedule=schedule, **values)
    return [lr_factor(config, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    found = factors(schedule)
    assert found[:WARMUP] == pytest.approx([(i + 1) / WARMUP for i in range(WARMUP)])
    assert found[0] > 0 and found[WARMUP - 1] == 1.0


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [  # the middle of the 80 steps after warm-up is reached in step 59
        ("constant", 1.0, 1.0),
        ("linear", 0.55, FLOOR),
        ("cosine", 0.55, FLOOR),
        ("wsd", 1.0, FLOOR),
    ],
)
def test_middle_and_last_step(schedule: str, middle: float, last: float) -> None:
    found = factors(schedule)
    assert found[59] == pytest.approx(middle)
    assert found[-1] == pytest.approx(last)


def test_closed_forms_at_a_quarter() -> None:
    """Step 39 ends a quarter of the 80 steps after warm-up."""
    assert factors("linear")[39] == pytest.approx(FLOOR + (1 - FLOOR) * 0.75)
    quarter = 0.5 + 0.5 * math.cos(math.pi / 4)
    assert factors("cosine")[39] == pytest.approx(FLOOR + (1 - FLOOR) * quarter)


def test_wsd_decays_over_its_last_steps_only() -> None:
    automatic = factors("wsd")
    assert automatic[89] == 1.0 and automatic[90] == pytest.approx(1 - 0.9 / 10)
    longer = factors("wsd", decay_steps=40)
    assert longer[59] == 1.0 and longer[79] == pytest.approx(0.55)
    assert longer[-1] == pytest.approx(FLOOR)
    at_once = factors("wsd", decay_steps=1)
    assert at_once[-2:] == pytest.approx([1.0, FLOOR])


def test_wsd_does_not_decay_during_warm_up() -> None:
    """A decay longer than what is left of the run begins where warm-up ends, without a jump."""
    found = factors("wsd", warmup_steps=90, decay_steps=50)
    assert found[89] == 1.0
    assert found[90:] == pytest.approx([1 - 0.9 * (i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_no_jump_and_never_up_again(schedule: str) -> None:
    found = factors(schedule)
    largest = {"constant": 0, "linear": 0.9 / 80, "cosine": 0.9 * math.pi / 160, "wsd": 0.09}
    after = list(zip(found[WARMUP - 1 :], found[WARMUP:], strict=False))
    assert max(a - b for a, b in after) <= largest[schedule] + 1e-12
    assert min(a - b for a, b in after) >= 0
    assert all(FLOOR - 1e-12 <= value <= 1 for value in found[WARMUP:])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_without_warm_up_the_first_step_is_near_the_peak(schedule: str) -> None:
    found = factors(schedule, warmup_steps=0)
    assert 0.98 < found[0] <= 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_is_all_warm_up_and_steps_beyond_the_last(schedule: Any) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=STEPS, min_lr_ratio=FLOOR)
    assert lr_factor(config, STEPS - 1, STEPS) == 1.0
    short = OptimizerConfig(schedule=schedule, warmup_steps=5, min_lr_ratio=FLOOR)
    assert lr_factor(short, 10 * STEPS, STEPS) == pytest.approx(FLOOR)
    wsd = OptimizerConfig(schedule="wsd", min_lr_ratio=FLOOR)
    assert lr_factor(wsd, 10 * STEPS, STEPS) == pytest.approx(FLOOR)
