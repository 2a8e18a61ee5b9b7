"""Signs of life and the verdicts drawn from them; real ranks die in tests/faults."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from spectral_scale.supervision.heartbeat import Heartbeat, Listener, known_dead, read_beats
from spectral_scale.supervision.stragglers import Stragglers
from spectral_scale.supervision.watchdog import LONG_SECONDS, Watchdog


def never(verdict: str, end_hanging: Callable[[], None]) -> NoReturn:
    raise AssertionError(verdict)


def test_silence_is_measured_by_the_listener_s_own_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock jumps by a day and back; the other rank goes on, then falls silent."""
    now = 0.0
    other = Heartbeat(tmp_path, 1)
    other.write()
    listener = Listener(tmp_path, [1], clock=lambda: now)
    for jump in (0.0, 86_400.0, 0.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1e9 + jump)
        now += 2.0
        other.write()
        listener.listen()
        assert listener.seen[1].heard_at == now
    for _ in range(5):
        now += 2.0
        listener.listen()
    assert now - listener.seen[1].heard_at == 10.0


def test_who_was_held_up_itself_blames_nobody(tmp_path: Path) -> None:
    now = 0.0
    Heartbeat(tmp_path, 1).write()
    listener = Listener(tmp_path, [1], clock=lambda: now)
    listener.listen()
    now = 500.0  # a stalled file system, or a stopped process
    listener.listen()
    assert now - listener.seen[1].heard_at == 0.0


def test_a_rank_that_restarts_or_has_not_begun_is_not_silent(tmp_path: Path) -> None:
    listener = Listener(tmp_path, [1, 2])
    listener.listen()
    assert not listener.seen
    beat = Heartbeat(tmp_path, 2)
    beat.write()
    listener.listen()
    assert set(listener.seen) == {2}
    (tmp_path / "heartbeats" / "rank_00002.json").write_text("{half")
    listener.listen()
    assert listener.seen[2].beat == beat.beat


def test_a_process_that_ended_is_known_dead(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 0)
    assert not known_dead(heart.beat), "this very process"
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    from dataclasses import replace

    import psutil

    beat = replace(heart.beat, pid=child, born=psutil.Process(child).create_time())
    assert not known_dead(beat)
    os.kill(child, 9)
    time.sleep(0.2)
    assert known_dead(beat), "a zombie"
    os.waitpid(child, 0)
    assert known_dead(beat)
    assert not known_dead(replace(beat, host="elsewhere")), "nothing is known of other hosts"


def test_phases_may_take_what_they_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dog = Watchdog(tmp_path, rank=0, world_size=1, timeout_seconds=45, end=never)
    dog.mark(0, "forward")
    assert dog._allowed("forward") == LONG_SECONDS, "it may compile the first time"
    now = 8.0
    dog.mark(0, "agree")
    assert dog._allowed("forward") == 80.0
    now = 8.5
    dog.mark(0, "save")
    assert dog._allowed("agree") == 45.0 and dog._allowed("save") == LONG_SECONDS
    now += LONG_SECONDS - 1
    assert dog._verdict() is None
    now += 30
    verdict = dog._verdict()
    assert verdict is not None and "rank 0 on" in verdict and "step 0 (save)" in verdict


def test_decompositions_have_their_time_and_torch_never_speaks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uneven phases take what an owner's work takes; patience never exceeds the given limit."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dog = Watchdog(
        tmp_path,
        rank=0,
        world_size=1,
        timeout_seconds=45,
        end=never,
        long_seconds=2000,
        most_seconds=2500,
    )
    dog.mark(0, "step")
    assert dog._allowed("step") == 2000
    now = 1500.0  # more than ordinary uneven phases may take
    assert dog._verdict() is None
    dog.mark(0, "save")
    assert dog._allowed("step") == 2500, "ten times 1,500 s would be longer than torch waits"


def test_a_run_leaves_its_last_heartbeat_and_no_empty_file(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with Watchdog(tmp_path, rank=0, world_size=1, timeout_seconds=45, end=never) as dog:
        dog.mark(7, "forward")
    assert [(b.step, b.phase, b.verdict) for b in read_beats(tmp_path)] == [(7, "done", None)]
    assert not list((tmp_path / "logs").iterdir())
    with (
        pytest.raises(ValueError, match="out of range"),
        Watchdog(tmp_path, rank=0, world_size=1, timeout_seconds=45, end=never),
    ):
        raise ValueError("out of range")
    assert "ValueError: out of range" in str(read_beats(tmp_path)[0].verdict)


def test_a_straggler_is_named_once_and_only_if_it_matters(caplog: pytest.LogCaptureFixture) -> None:
    stragglers = Stragglers(lambda rank: f"host{rank}")
    with caplog.at_level(logging.WARNING, "spectral_scale"):
        for seconds in ([0.1, 0.1, 0.4], [0.1, 0.1, 0.11], [0.1, 0.4, 0.1]):
            stragglers.add(seconds)
            found = stragglers.metrics()
        assert not caplog.records, "it must be the same rank twice in a row"
        assert (found["ranks/slowest"], found["ranks/slowest_seconds"]) == (1, 0.4)
        for _ in range(4):
            stragglers.add([0.1, 0.4, 0.1])
            stragglers.metrics()
        for _ in range(4):
            stragglers.add([0.001, 0.002, 0.001])
            stragglers.metrics()
    assert len(caplog.records) == 1 and "rank 1 on host1" in caplog.text
    assert Stragglers(str).metrics() == {}
