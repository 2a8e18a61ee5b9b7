"""What a run takes: saves, failures, MFU, and the command that tells it."""

import json
import math

import pytest

from spectral_scale.cli.main import main
from spectral_scale.plan.estimate import expected_seconds, save_interval_seconds

WORDS = ["--model.name=opt-125m", "--train.precision=bf16", "--train.global_batch_size=128"]


def test_the_interval_of_saves() -> None:
    """Saves of 50 s, a failure every 10,000 s: sqrt(2 x 50 x 10,000) - 50 = 950 s."""
    assert save_interval_seconds(50, 10_000) == pytest.approx(950)
    assert save_interval_seconds(6000, 10_000) == 10_000
    # No other interval loses less.
    best = expected_seconds(1e6, 50, 950 + 50, 10_000)
    for other in (500, 800, 1300, 2000):
        assert expected_seconds(1e6, 50, other, 10_000) > best - 1


def test_failures_cost_half_an_interval_and_a_restart() -> None:
    assert expected_seconds(1000, 0, 100, math.inf) == 1000
    assert expected_seconds(1000, 0, 100, 1000) == pytest.approx(1000 * (1 + 0.05 + 0.6))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--gpu", "h100", "--nodes", "2", "--gpus-per-node", "4"]
    assert main(["plan", *WORDS, *place, "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    found = plan["estimate"]
    assert plan["gpu_memory_bytes"] == 80e9 and found["rates"] == "assumed"
    assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"])
    speed = plan["tokens_per_step"] / found["step_seconds"]
    assert found["tokens_per_second"] == pytest.approx(speed)
    assert found["mfu"] == pytest.approx(found["flops_per_token"] * speed / (8 * 989e12))
    assert found["gpu_hours"] == pytest.approx(8 * found["hours"])
    assert main(["plan", *WORDS, *place, "--energy", "--network", "25"]) == 0
    text = capsys.readouterr().out
    for part in ("2 x 4 h100", "MFU", "GPU-hours", "a swap takes", "save every", "kWh", "25 Gb/s"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h10"], "did you mean h100"),
        (["--nodes", "2"], "--nodes is for estimates of time; give --gpu"),
        (["--energy"], "give --gpu"),
        (["--gpu", "h100", "--network", "0"], "must be above 0 Gb/s"),
        (["--gpu", "h100", "--world-size", "3"], "--world-size 3 differs"),
        (["--gpu", "h100", "--gpu-memory", "-1"], "must be above 0 GB"),
        (["--gpu", "v100-32gb"], "computes no products in bf16"),
        (["--calibration", "nowhere.json"], "cannot be read"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *WORDS, *words]) == 78
    assert message in capsys.readouterr().err
