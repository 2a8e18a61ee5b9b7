"""A verdict that is read a step late changes no bit of a run, and nothing waits in the step."""

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from spectral_scale.backends.torch.backend import TorchBackend
from spectral_scale.engine import late_verdict, loop
from spectral_scale.errors import HealthError
from spectral_scale.optim import build
from spectral_scale.parallel import stacking
from spectral_scale.supervision import supervisor
from spectral_scale.supervision.health import HealthMonitor
from spectral_scale.supervision.incidents import read_incidents
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS = 12  # swaps after 4 and 8 applied steps
SMALL: dict[str, Any] = {
    "model__num_layers": 1,
    "train__steps": STEPS,
    "train__eval_interval": 100,
    "checkpoint__interval": 100,
    "data__validation_sequences": 4,
    "optimizer__schedule": "cosine",
}
LATE, AT_ONCE = {"metrics__log_interval": 100}, {"metrics__log_interval": 1}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`spoil(factor, steps)`: multiply the loss of these data steps."""
    forward, product = loop.TrainingLoop._forward_backward, loop.token_loss_sum

    def spoil(factor: float, steps: tuple[int, ...]) -> None:
        def forward_backward(self: Any, batch: Any) -> Any:
            scale = factor if batch.step in steps else 1.0
            monkeypatch.setattr(loop, "token_loss_sum", lambda *a: product(*a) * scale)
            return forward(self, batch)

        monkeypatch.setattr(loop.TrainingLoop, "_forward_backward", forward_backward)

    return spoil


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are left open, as they come."""
    steps: list[int] = []
    original = late_verdict.LateVerdicts.add

    def add(self: Any, step: int, *arguments: Any, **keys: Any) -> Any:
        stats = original(self, step, *arguments, **keys)
        steps.extend([step] if stats.applied is None else [])
        return stats

    monkeypatch.setattr(late_verdict.LateVerdicts, "add", add)
    return steps


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert left.keys() == right.keys()
    return all(np.array_equal(left[name], right[name]) for name in left)


def incidents(run_dir: Path) -> list[tuple[str, int, str | None]]:
    return [(i["kind"], i["step"], i.get("reason")) for i in read_incidents(run_dir)]


@pytest.mark.parametrize("method", ["sst", "lora", "relora", "frod", "galore", "full"])
def test_late_is_as_at_once(
    corpus: Path, tmp_path: Path, spoil: Any, opened: list[int], method: str
) -> None:
    """Steps 6 and 7 are left out: the same weights, moments, banks, counts and incidents."""
    spoil(math.nan, (5, 6))
    changes = SMALL | {"spectral__method": method}
    changes |= {"model__num_layers": 2} if method == "frod" else {}
    at_once = train_tiny(tiny_config(corpus, tmp_path / "at_once", **changes | AT_ONCE))
    assert not opened
    late = train_tiny(tiny_config(corpus, tmp_path / "late", **changes | LATE))
    assert ({6, 7} <= set(opened)) == (method != "galore"), opened
    assert STEPS not in opened  # what is logged is read at once
    if method == "sst":
        assert 4 not in opened and 3 in opened  # a swap knows whether its step counts
    assert same(late["tensors"], at_once["tensors"])
    assert late["losses"][STEPS] == at_once["losses"][STEPS]
    assert incidents(tmp_path / "late") == incidents(tmp_path / "at_once")
    skipped = {step: v["health/skipped"] for step, v in late["lines"] if "health/skipped" in v}
    assert skipped.keys() == {6, 7}
    assert late["lines"][-1][1]["train/skipped_steps"] == 2


def test_a_spike_is_judged_by_the_healthy_steps_up_to_the_one_before(
    corpus: Path, tmp_path: Path, spoil: Any, opened: list[int]
) -> None:
    spoil(100.0, (9,))
    changes = SMALL | {"health__spike_sigmas": 8, "health__spike_window": 16}
    results = [
        train_tiny(tiny_config(corpus, tmp_path / name, **changes | keys))
        for name, keys in (("late", LATE), ("at_once", AT_ONCE))
    ]
    assert 10 in opened
    assert same(results[0]["tensors"], results[1]["tensors"])
    assert incidents(tmp_path / "late") == incidents(tmp_path / "at_once")
    assert [step for _, step, _ in incidents(tmp_path / "late")] == [10]


def test_a_return_to_a_checkpoint_passes_over_the_same_data(
    corpus: Path, tmp_path: Path, spoil: Any, opened: list[int]
) -> None:
    """The verdict that may demand it is read in its own step."""
    spoil(math.nan, (6, 7, 8))
    changes = SMALL | {"checkpoint__interval": 3}
    late = train_tiny(tiny_config(corpus, tmp_path / "late", **changes | LATE))
    assert 7 in opened and 9 not in opened
    at_once = train_tiny(tiny_config(corpus, tmp_path / "at_once", **changes | AT_ONCE))
    assert [kind for kind, _, _ in incidents(tmp_path / "late")][-1] == "rollback"
    assert incidents(tmp_path / "late") == incidents(tmp_path / "at_once")
    assert same(late["tensors"], at_once["tensors"])


@pytest.mark.parametrize("stop_after", [6, 7])
def test_a_stop_saves_what_is_known_of_the_open_step(
    corpus: Path, tmp_path: Path, spoil: Any, stop_after: int
) -> None:
    spoil(math.nan, (5, 6))
    whole = train_tiny(tiny_config(corpus, tmp_path / "whole", **SMALL | AT_ONCE))
    config = tiny_config(corpus, tmp_path / "parts", **SMALL | LATE)
    assert train_tiny(config, stop_after=stop_after)["step"] == stop_after
    assert same(train_tiny(config)["tensors"], whole["tensors"])
    assert incidents(tmp_path / "parts") == incidents(tmp_path / "whole")


BROKEN = {
    "the update ignores the flag": (build, "flag_given"),
    "the retraction ignores the flag": (stacking, "keep_if"),
    "the host forgets to count": (late_verdict.LateVerdicts, "_left_out"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_step_shows(
    fault: str, corpus: Path, tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(100.0, (5,))
    changes = SMALL | {"health__spike_sigmas": 8, "health__spike_window": 16}
    at_once = train_tiny(tiny_config(corpus, tmp_path / "at_once", **changes | AT_ONCE))
    where, name = BROKEN[fault]
    if name == "flag_given":

        @contextmanager
        def without(*_: Any) -> Iterator[None]:
            yield

        monkeypatch.setattr("spectral_scale.backends.torch.backend.flag_given", without)
    elif name == "keep_if":
        monkeypatch.setattr(where, name, lambda _, lengths: lengths)
    else:
        monkeypatch.setattr(where, name, lambda *_: None)
    late = train_tiny(tiny_config(corpus, tmp_path / "late", **changes | LATE))
    assert not same(late["tensors"], at_once["tensors"])


def test_a_device_that_does_otherwise_than_the_rules_say_is_found(
    corpus: Path, tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(100.0, (9,))
    monkeypatch.setattr(HealthMonitor, "limits", lambda _: (math.inf, math.inf))
    changes = SMALL | {"health__spike_sigmas": 8, "health__spike_window": 16}
    with pytest.raises(HealthError, match="step 10 was applied on the device of rank 0"):
        train_tiny(tiny_config(corpus, tmp_path, **changes | LATE))


class Waits(TorchDispatchMode):
    """Where the host asks for a value of a tensor; the consensus, all of it on the host, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "spectral_scale" in f.filename]
        self.places.append(f"{Path(frames[-1].filename).name}:{frames[-1].name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.note()
        return func(*args, **(kwargs or {}))


def waits_by_step(config: Any, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Train; by step, what waited in it."""
    found: dict[int, list[str]] = {}
    one_step, consensus = loop.TrainingLoop._one_step, supervisor.reach_consensus
    tolist = Tensor.tolist
    active: list[Waits] = []

    def counted(self: Any, batch: Any) -> None:
        with Waits() as seen:
            active.append(seen)
            one_step(self, batch)
            active.pop()
        found[self.step] = seen.places

    def on_host(*arguments: Any) -> Any:
        modes = active.copy()
        active.clear()
        with _disable_current_modes():
            agreed = consensus(*arguments)
        active.extend(modes)
        return agreed

    def listed(self: Tensor) -> Any:
        for mode in active:
            mode.note()
        return tolist(self)

    monkeypatch.setattr(loop.TrainingLoop, "_one_step", counted)
    monkeypatch.setattr(supervisor, "reach_consensus", on_host)
    monkeypatch.setattr(Tensor, "tolist", listed)
    train_tiny(config)
    return found


@pytest.mark.parametrize("method", ["sst", "lora", "full"])
def test_an_ordinary_step_waits_for_the_step_before_only(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    changes = SMALL | LATE | {"spectral__method": method, "health__spike_sigmas": 50}
    found = waits_by_step(tiny_config(corpus, tmp_path, **changes), monkeypatch)
    ordinary = [step for step in range(3, STEPS) if step not in (4, 5, 8, 9)]  # around swaps
    assert {step: found[step] for step in ordinary} == {
        step: ["late_read.py:read"] for step in ordinary
    }


def test_a_host_that_asks_before_the_update_is_seen(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchBackend, "_obeys_on_device", lambda _: False)
    found = waits_by_step(tiny_config(corpus, tmp_path, **SMALL | LATE), monkeypatch)
    assert found[6] == ["base.py:step", "late_read.py:read"]
