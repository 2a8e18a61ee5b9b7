"""The loop sets learning rates; hooks do it in a user's own loop. Both give the same bits."""

from typing import Any

import torch

from spectral_scale.config.schema import OptimizerConfig
from spectral_scale.engine.learning_rate import LearningRates
from spectral_scale.methods.lr_ramp import ramp_learning_rates
from spectral_scale.methods.schedule import SpectralSchedule
from spectral_scale.optim.schedules import lr_factor

CONFIG = OptimizerConfig(lr=3e-4, spectral_lr=7e-3, warmup_steps=3, schedule="cosine")
STEPS = 12


def groups() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "params": [torch.nn.Parameter(torch.ones(1))],
            "lr": peak,
            "base_lr": peak,
            "spectral": spectral,
        }
        for name, peak, spectral in (("dense", 3e-4, False), ("sigma", 7e-3, True))
    ]


def test_rates_equal_those_of_hooks_and_a_scheduler_to_the_bit() -> None:
    schedule = SpectralSchedule(steps_per_iteration=4, iterations_per_round=2, warmup_steps=3)
    applied = 0

    def ramp() -> float:
        return schedule.ramp(applied)

    hooked = torch.optim.SGD(groups(), lr=1.0)
    ramp_learning_rates(hooked, ramp)
    seen: list[float] = []
    hooked.register_step_pre_hook(lambda opt, *_: seen.extend(g["lr"] for g in opt.param_groups))
    plain = torch.optim.SGD(groups(), lr=1.0)
    rates = LearningRates(plain, CONFIG, total_steps=STEPS, ramp=ramp)
    ramped = 0
    for applied in range(STEPS):
        for group in hooked.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(CONFIG, applied, STEPS)
        seen.clear()
        hooked.step()
        rates.set_for_step(applied)
        assert [group["lr"] for group in plain.param_groups] == seen
        ramped += ramp() < 1.0
    assert 0 < ramped < STEPS


def test_the_log_reads_what_was_set() -> None:
    optimizer = torch.optim.SGD(groups(), lr=1.0)
    rates = LearningRates(optimizer, CONFIG, total_steps=STEPS, ramp=lambda: 0.5)
    rates.set_for_step(0)
    values = rates.metrics()
    assert values["train/lr"] == values["train/lr/dense"] == 3e-4 * (1 / 3)
    other = (values.keys() - {"train/lr", "train/lr/dense"}).pop()
    assert values[other] == 7e-3 * (1 / 3) * 0.5
