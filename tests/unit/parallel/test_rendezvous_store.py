"""Ranks that cannot meet say why, and which of them is missing."""

import os
import socket
from collections.abc import Iterator

import pytest

from spectral_scale.errors import LaunchError
from spectral_scale.parallel.rendezvous_store import meet
from spectral_scale.testing.distributed import run_distributed


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that this test may use, as rank 0 of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    values = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (values | {"MASTER_PORT": str(number)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SPECTRAL_SCALE_MEETING_SECONDS", "1")
    yield number


def test_missing_ranks_are_named(port: int) -> None:
    with pytest.raises(LaunchError, match=f"port {port} these ranks of 3 are missing: 1, 2;"):
        meet(3)


def test_a_port_that_is_taken(port: int) -> None:
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(LaunchError, match="taken by process") as caught:
            meet(3)
    assert str(os.getpid()) in str(caught.value)


def test_an_address_that_leads_nowhere(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LaunchError, match="rank 1 found no rank 0 at 127.0.0.1"):
        meet(3)
    monkeypatch.setenv("SPECTRAL_SCALE_MEETING_SECONDS", "soon")
    with pytest.raises(LaunchError, match="'soon' must be a number"):
        meet(3)


def leave_early(rank_that_leaves: int) -> str:
    """One rank of three never comes, and rank 0 waits less long than the other."""
    rank = int(os.environ["RANK"])
    if rank == rank_that_leaves:
        return "never came"
    os.environ["SPECTRAL_SCALE_MEETING_SECONDS"] = "2" if rank == 0 else "30"
    try:
        meet(3)
    except LaunchError as error:
        return str(error)
    return "met"


def test_all_hear_of_it() -> None:
    first, second, third = run_distributed(leave_early, 3, 2)
    assert "of 3 are missing: 2;" in first
    assert "rank 0 at" in second and "left while rank 1 waited" in second
    assert third == "never came"
