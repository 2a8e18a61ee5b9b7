"""Times of work: by the host's clock, or by events of a GPU that are read later."""

import time
from typing import Any

import pytest
import torch

from spectral_scale.methods.phases import PhaseClock
from spectral_scale.parallel.device_time import Span
from spectral_scale.supervision.stragglers import WorkClock

GPU = torch.device("cuda", 0)


class Event:
    """An event of a device that is a second further at each one, and which host waited for."""

    recorded = 0
    waited: list[int]

    def __init__(self, **_: Any) -> None:
        self.at = 0

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def synchronize(self) -> None:
        Event.waited.append(self.at)

    def elapsed_time(self, other: "Event") -> float:
        return 1000.0 * (other.at - self.at)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    Event.recorded, Event.waited = 0, []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return Event


def test_the_host_s_clock_counts_on_the_host(events: type[Event]) -> None:
    span = Span(torch.device("cpu"))
    assert span.seconds() == 0.0
    time.sleep(0.01)
    span.end()
    assert 0.01 <= span.seconds() < 5 and not events.recorded


def test_phases_of_a_gpu_are_timed_by_it_and_read_at_the_end(events: type[Event]) -> None:
    clock = PhaseClock(0, GPU)
    clock.start(1)
    for name in ("commit", "decompose", "commit"):
        with clock.phase(name):
            pass
    assert not events.waited
    assert clock.seconds["commit"] == 2.0 and clock.seconds["decompose"] == 1.0
    assert clock.seconds["commit"] == 2.0  # asking again adds nothing
    clock.start(2)
    assert not any(clock.seconds.values())


def test_work_on_a_gpu_is_read_a_step_late(events: type[Event]) -> None:
    clock, found = WorkClock(GPU), []
    for _ in range(3):
        clock.start()
        clock.stop()
        found.append(clock.seconds())
    assert found == [0.0, 1.0, 1.0]
    assert events.waited == [3, 5]  # each the end of the step before
