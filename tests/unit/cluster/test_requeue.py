"""When a job is started again, and with which code it ends."""

from typing import Any

import pytest

from spectral_scale.cluster.requeue import requeue_decision

NOW = 1000.0


def status(state: str, code: int, **changes: Any) -> dict[str, Any]:
    """As the run writes it."""
    return {
        "state": state, "exit_code": code, "requeue": code == 75, "reason": "why", "job": "7",
        "time": NOW + 1, "step": 9, "start_step": 4,
    } | changes  # fmt: skip


STOPPED = status("stopped", 75)


@pytest.mark.parametrize(
    ("code", "found", "expected"),
    [
        (0, status("completed", 0), (0, False)),
        (75, STOPPED, (75, True)),
        (1, STOPPED, (75, True)),  # torchrun
        (143, STOPPED, (75, True)),  # a launcher that ended the last rank at its exit
        (75, STOPPED | {"requeue": False}, (75, False)),  # the user said: hold
        (75, STOPPED | {"step": 4}, (93, False)),  # got nowhere
        (1, status("failed", 1), (1, False)),
        (1, status("no_progress", 93), (93, False)),
        (93, status("no_progress", 93), (93, False)),
        (78, {}, (78, False)),
        (1, STOPPED | {"time": NOW - 1}, (1, False)),  # of the attempt before
        (75, STOPPED | {"time": NOW - 1}, (75, False)),
        (1, STOPPED | {"job": "8"}, (1, False)),
        (75, {}, (75, False)),
        (137, status("running", 0) | {"exit_code": None}, (137, False)),
    ],
)
def test_endings(code: int, found: dict[str, Any], expected: tuple[int, bool]) -> None:
    ending = requeue_decision(code, found, job="7", since=NOW)
    assert (ending.code, ending.requeue) == expected
