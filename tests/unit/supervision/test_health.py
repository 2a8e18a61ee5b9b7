"""Steps left out, and returns to a checkpoint: exact where nothing is wrong, else together."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.config.schema_supervision import HealthConfig
from spectral_scale.errors import HealthError
from spectral_scale.supervision.health import HealthMonitor
from spectral_scale.supervision.incidents import read_incidents
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_in_turn, train_tiny

STEPS = 10  # swaps after 4 and 8 applied steps
SMALL: dict[str, Any] = {
    "model__num_layers": 1,
    "train__steps": STEPS,
    "train__eval_interval": 100,
    "checkpoint__interval": 3,
    "data__validation_sequences": 4,
}
BAD_DATA_STEPS = (5, 6)


def judge(monitor: HealthMonitor, loss: float, norm: float = 1.0) -> bool:
    return monitor.judge(loss=loss, norm=norm, faulty_ranks=()).healthy


def test_spikes_stand_out_of_the_healthy_steps_before() -> None:
    monitor = HealthMonitor(HealthConfig(spike_sigmas=6, spike_window=16))
    for i in range(4):
        assert judge(monitor, 5.0 + 0.1 * (i % 2)), "nothing is known yet"
    assert not judge(monitor, 9.0) and monitor.streak == 1
    verdict = monitor.judge(loss=5.0, norm=50.0, faulty_ranks=())
    assert verdict.reason is not None and "gradient norm 50 above" in verdict.reason
    assert judge(monitor, 5.1) and monitor.streak == 0, "what was left out moved no limit"
    monitor.forget_norms()
    assert judge(monitor, 5.1, norm=50.0), "other triplets may have other gradients"
    again = HealthMonitor(HealthConfig(spike_sigmas=6, spike_window=16), monitor.state())
    assert not judge(again, 9.0), "a resumed run knows what it knew"
    off = HealthMonitor(HealthConfig())
    assert all(judge(off, 10.0**i) for i in range(9))


def test_so_many_in_a_row_go_back_and_not_for_ever() -> None:
    monitor = HealthMonitor(HealthConfig(rollback_after=2, max_rollbacks=1))
    for rollbacks in range(2):
        for _ in range(2):
            assert not monitor.must_go_back
            verdict = monitor.judge(loss=math.nan, norm=1.0, faulty_ranks=(1, 3))
            assert verdict.reason == "loss or gradient not finite on rank 1, 3"
        assert monitor.must_go_back and monitor.may_go_back == (rollbacks == 0)
        monitor.went_back(None)
    monitor.progressed()
    assert monitor.may_go_back
    never = HealthMonitor(HealthConfig(rollback_after=0))
    for _ in range(99):
        never.judge(loss=math.nan, norm=1.0, faulty_ranks=(0,))
    assert not never.must_go_back


def poisoned_loader(bad: tuple[int, ...], rank: int | None = None) -> None:
    """From now on the loss of these data steps is NaN in this process, if it is that rank."""
    from spectral_scale.engine import loop
    from spectral_scale.parallel.rank_info import detect_rank_info

    if rank is not None and detect_rank_info().rank != rank:
        return
    original = loop.TrainingLoop._forward_backward
    product = loop.token_loss_sum

    def forward_backward(self: Any, batch: Any) -> Any:
        factor = math.nan if batch.step in bad else 1.0
        loop.token_loss_sum = lambda *a: product(*a) * factor
        return original(self, batch)

    loop.TrainingLoop._forward_backward = forward_backward  # type: ignore[method-assign]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`poisoned_loader`, undone afterwards."""
    from spectral_scale.engine import loop

    for target, name in ((loop.TrainingLoop, "_forward_backward"), (loop, "token_loss_sum")):
        monkeypatch.setattr(target, name, getattr(target, name))
    yield poisoned_loader


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert np.array_equal(left[name], right[name]), name


def test_a_run_without_faults_is_the_same_with_and_without_health(
    corpus: Path, tmp_path: Path
) -> None:
    off = tiny_config(corpus, tmp_path / "off", **SMALL, health__skip=False)
    on = tiny_config(corpus, tmp_path / "on", **SMALL, health__spike_sigmas=50)
    watched, plain = train_tiny(on), train_tiny(off)
    assert watched["losses"] == plain["losses"]
    same(watched["tensors"], plain["tensors"])
    assert not read_incidents(tmp_path / "on")


def test_the_loss_differs_if_a_step_is_left_out_though_it_must_not_be(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: a rule that fires on a healthy step shows."""
    config = tiny_config(corpus, tmp_path / "off", **SMALL)
    plain = train_tiny(config)
    monkeypatch.setattr(HealthMonitor, "_limit", lambda *_: 0.0)
    config = tiny_config(corpus, tmp_path / "on", **SMALL, health__spike_sigmas=1)
    with pytest.raises(HealthError):
        train_tiny(config)
    assert len(read_incidents(tmp_path / "on")) == 3 and plain["step"] == STEPS


METHODS = ["sst", "lora", "galore", "full"]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_left_out_touches_nothing_but_the_data(
    corpus: Path, tmp_path: Path, poison: Any, method: str
) -> None:
    """A run whose steps 6 and 7 are left out is one of two steps fewer on the other batches."""
    changes = SMALL | {"spectral__method": method, "optimizer__schedule": "constant"}
    poison(BAD_DATA_STEPS)
    skipped = train_tiny(tiny_config(corpus, tmp_path / "a", **changes))
    assert skipped["step"] == STEPS and set(skipped["losses"]) == {1, 2, 3, 4, 5, 8, 9, 10}

    from spectral_scale.data.loader import TrainLoader

    original = TrainLoader.steps

    def without(self: TrainLoader, start: int, stop: int, **options: Any) -> Any:
        for batch in original(self, start, stop + 2, **options):
            if batch.step not in BAD_DATA_STEPS:
                yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoader, "steps", without)
        config = tiny_config(corpus, tmp_path / "b", **changes | {"train__steps": STEPS - 2})
        fewer = train_tiny(config)
    assert list(skipped["losses"].values()) == list(fewer["losses"].values())
    same(skipped["tensors"], fewer["tensors"])
    incidents = read_incidents(tmp_path / "a")
    assert [i["step"] for i in incidents] == [6, 7]
    assert len(incidents[0]["samples"]) == len(incidents[0]["documents"]) == 12


def test_going_back_passes_over_the_data_and_is_exact(
    corpus: Path, tmp_path: Path, poison: Any
) -> None:
    """Three bad batches: back to step 3, whose next batch is the one after them; a process that is
    started anew at the next checkpoint goes on the same way."""
    poison((5, 6, 7))
    changes = SMALL | {"checkpoint__keep_last": 9}
    result = train_tiny(tiny_config(corpus, tmp_path / "a", **changes))
    assert result["step"] == STEPS
    kinds = [incident["kind"] for incident in read_incidents(tmp_path / "a")]
    assert kinds == ["skipped step"] * 3 + ["rollback"]
    rollback = read_incidents(tmp_path / "a")[-1]
    assert (rollback["step"], rollback["to_step"], rollback["passed_over"]) == (8, 3, 5)

    from spectral_scale.data.loader import TrainLoader

    original = TrainLoader.steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TrainLoader,
            "steps",
            lambda self, start, stop, **options: (
                b for b in original(self, start, stop + 5, **options) if not 3 <= b.step < 8
            ),
        )
        straight = train_tiny(tiny_config(corpus, tmp_path / "b", **changes))
    after = {step: loss for step, loss in straight["losses"].items()}
    assert {step: result["losses"][step] for step in after} == after
    same(result["tensors"], straight["tensors"])

    for step in (9, 10):
        for file in (path := tmp_path / "a" / "checkpoints" / f"step_{step:08d}").glob("*"):
            file.unlink()
        if path.exists():
            path.rmdir()
    again = train_tiny(tiny_config(corpus, tmp_path / "a", **changes))
    assert min(again["losses"]) == 7 and again["losses"][10] == result["losses"][10]
    same(again["tensors"], result["tensors"])


def test_what_does_not_help_ends_with_the_samples(
    corpus: Path, tmp_path: Path, poison: Any
) -> None:
    poison(tuple(range(5, 100)))
    changes = SMALL | {"health__rollback_after": 2, "health__max_rollbacks": 1}
    with pytest.raises(HealthError, match="going back 1 times did not help.*samples \\["):
        train_tiny(tiny_config(corpus, tmp_path, **changes))
    early = tiny_config(corpus, tmp_path / "early", **changes | {"checkpoint__interval": 100})
    with pytest.raises(HealthError, match="there is no checkpoint to go back to"):
        train_tiny(early)


def poison_and_train(config: Any, rank: int) -> Any:
    poisoned_loader(BAD_DATA_STEPS, rank)
    return train_in_turn(config)


BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {},
    "fsdp2": {"parallel__backend": "fsdp2"},
    "zero0": {"parallel__backend": "deepspeed", "parallel__zero_stage": 0},
    "zero2": {"parallel__backend": "deepspeed", "parallel__zero_stage": 2},
    "zero3": {"parallel__backend": "deepspeed", "parallel__zero_stage": 3},
    "zero2+offload": {
        "parallel__backend": "deepspeed",
        "parallel__zero_stage": 2,
        "parallel__offload": "cpu",
    },
    "zero3+offload": {
        "parallel__backend": "deepspeed",
        "parallel__zero_stage": 3,
        "parallel__offload": "cpu",
    },
    "hsdp": {"parallel__backend": "fsdp2", "parallel__shard_group": 1},
    "fsdp2+tp": {"parallel__backend": "fsdp2", "parallel__tensor_parallel": 2},
}


def test_one_rank_s_nan_leaves_the_step_out_on_all_backends(
    corpus: Path, tmp_path: Path, poison: Any
) -> None:
    """Two ranks on each backend agree with one process that left the same steps out."""
    changes = SMALL | {"train__micro_batch_size": 3}
    configs = [
        (tiny_config(corpus, tmp_path / name, **changes | keys), None)
        for name, keys in BACKENDS.items()
    ]
    found = run_distributed(poison_and_train, 2, configs, 1, timeout_seconds=250)
    poison(BAD_DATA_STEPS)
    alone = train_tiny(tiny_config(corpus, tmp_path / "alone", **changes))
    for i, name in enumerate(BACKENDS):
        assert {rank[i]["step"] for rank in found} == {STEPS}, name
        losses = found[0][i]["losses"]
        assert losses.keys() == alone["losses"].keys(), name
        assert losses == pytest.approx(alone["losses"], abs=1e-5), name
        reasons = [incident["reason"] for incident in read_incidents(tmp_path / name)]
        assert reasons == ["loss or gradient not finite on rank 1"] * 2, name
