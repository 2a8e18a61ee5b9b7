"""Waits end in an order: the watchdog names a rank before torch gives up."""

from dataclasses import replace
from datetime import timedelta

import pytest

from spectral_scale.backends.limits import UNEVEN_SECONDS, WaitLimits, wait_limits
from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.parallel.group import COLLECTIVE_TIMEOUT
from spectral_scale.supervision.watchdog import LONG_SECONDS


def limits(
    model: str, method: str, *, world_size: int, device: str = "cuda", silence: float = 45.0
) -> WaitLimits:
    """Of a preset under a method."""
    words = [
        f"--model.name={model}",
        f"--spectral.method={method}",
        "--data.train=nowhere",
        "--train.run_dir=nowhere",
        "--train.global_batch_size=64",
        "--train.micro_batch_size=1",
        f"--health.hang_timeout_seconds={silence}",
    ]
    return wait_limits(resolve(load_config([], words).config, world_size=world_size), device)


def test_a_run_without_decompositions_has_the_ordinary_limits() -> None:
    found = limits("opt-13b", "full", world_size=8)
    assert found == WaitLimits(phase=600, verdict=750, collective=COLLECTIVE_TIMEOUT)
    assert UNEVEN_SECONDS == LONG_SECONDS and COLLECTIVE_TIMEOUT == timedelta(minutes=30)


def test_limits_follow_from_the_work_of_the_fullest_owner() -> None:
    """OPT-13B on 8 GPUs: 30 decompositions a rank, 30 minutes at the rate that is assumed."""
    found = limits("opt-13b", "sst", world_size=8)
    assert round(found.phase) == 2211 and round(found.verdict) == 2763
    assert round(found.collective.total_seconds()) == 5677
    assert limits("opt-13b", "sst", world_size=4).phase > found.phase
    assert limits("opt-13b", "sst", world_size=8, device="cpu").phase > found.phase
    assert limits("opt-13b", "galore", world_size=8).phase == pytest.approx(found.phase)


@pytest.mark.parametrize("silence", [0.0, 45.0, 3600.0])
@pytest.mark.parametrize("method", ["full", "sst"])
def test_the_verdict_comes_before_torch_gives_up(method: str, silence: float) -> None:
    """A rank may wait since a whole phase when rank 0's clock starts; then rank 0 waits as long as
    it may, and the others two silences longer."""
    found = limits("opt-1.3b", method, world_size=8, silence=silence)
    waited = found.verdict + found.verdict + 2 * silence
    assert found.phase <= found.verdict and max(found.phase, silence) <= found.verdict
    assert waited < found.collective.total_seconds()
    short = replace(found, collective=timedelta(minutes=10))  # what used to be the limit
    assert waited > short.collective.total_seconds()
