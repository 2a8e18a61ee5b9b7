"""What the checks of runs call wrong: each judgement with a run that it must refuse."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_scale.gpu_checks import equivalence, failures, hot_path, training
from spectral_scale.gpu_checks.findings import Figure
from spectral_scale.gpu_checks.place import Place
from spectral_scale.gpu_checks.runs import different, largest_gap
from spectral_scale.gpu_checks.synchronisations import MESSAGE, counting_syncs

TENSORS = {"model/a": torch.ones(3), "bank/w/active": torch.tensor([0, 2])}


def wrong(figures: list[Figure]) -> list[str]:
    return [figure.name for figure in figures if not figure.ok]


def a_run(losses: list[float], tensors: dict[str, Tensor] = TENSORS) -> Any:
    """A run with these losses from step 1 on."""
    return SimpleNamespace(
        series=lambda key: dict(enumerate(losses, start=1)), tensors=lambda: tensors
    )


def test_series_and_tensors_are_compared_to_the_bit() -> None:
    assert largest_gap({1: 1.0}, {1: 1.5}) == 0.5
    assert largest_gap({1: 1.0}, {2: 1.0}) == float("inf")
    assert largest_gap({}, {}) == float("inf")
    assert largest_gap({1: float("nan")}, {1: float("nan")}) == float("inf")
    nan = {"a": torch.tensor([float("nan")])}
    assert different(nan, {"a": nan["a"].clone()}) == []
    assert different({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, -0.0])}) == ["a"]
    assert different({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int32)}) == ["a"]
    assert different({"a": torch.zeros(2)}, {"b": torch.zeros(2)}) == ["a", "b"]
    assert different({"a": torch.tensor(1)}, {"a": torch.tensor(1)}) == []


def test_a_run_that_is_not_repeated_to_the_bit_fails() -> None:
    first = a_run([3.0, 2.0, 1.0])
    assert wrong(training.same_run("x", first, first, TENSORS)) == []
    resumed = a_run([3.0, 2.0, 1.0])
    resumed.series = lambda key: {3: 1.0}
    assert wrong(training.same_run("x", resumed, first, TENSORS, after=2)) == []
    off = a_run([3.0, 2.0, 1.0 + 1e-12])
    assert wrong(training.same_run("x", off, first, TENSORS)) == ["x: difference of the loss"]
    changed = a_run([3.0, 2.0, 1.0], TENSORS | {"model/a": torch.ones(3) * (1 + 1e-7)})
    assert wrong(training.same_run("x", changed, first, TENSORS)) == ["x: equal tensors"]


def test_other_triplets_fail_and_none_at_all_too() -> None:
    first = a_run([2.0, 1.0])
    assert wrong(training.same_triplets(first, first)) == []
    other = a_run([2.0, 1.0], TENSORS | {"bank/w/active": torch.tensor([0, 3])})
    assert wrong(training.same_triplets(other, first)) == ["matrices with the same triplets"]
    empty = a_run([2.0, 1.0], {})
    assert wrong(training.same_triplets(empty, empty)) == ["matrices with the same triplets"]


def test_a_peak_above_the_plan_fails() -> None:
    assert wrong(training.peak_figures("x", 10_000_000, 10e6)) == []
    assert wrong(training.peak_figures("x", 10_000_001, 10e6)) == ["x: peak, MB"]
    assert wrong(training.peak_figures("x", None, 10e6)) == []


def test_only_the_checkpoint_of_halfway_is_left_in_the_copy(tmp_path: Path) -> None:
    for step in (5, 10):
        (tmp_path / "run" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    training.halfway_copy(tmp_path / "run", tmp_path / "copy")
    assert [f.name for f in (tmp_path / "copy" / "checkpoints").iterdir()] == ["step_00000005"]


# -- the hot path ----------------------------------------------------------------------------


def test_reads_are_counted_with_their_lines(place: Place) -> None:
    tensor = torch.ones(3)
    with counting_syncs(place) as counter:
        tensor.sum().item()
        assert bool(tensor.max() > 0)
        tensor + 1
    assert counter.count == 2
    assert all(Path(__file__).name in where for where in counter.places)


def test_a_gpu_s_own_warnings_are_counted_and_others_pass(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    gpu = replace(place, device=torch.device("cuda", 0))
    with pytest.warns(UserWarning, match="something else"), counting_syncs(gpu) as counter:
        warnings.warn(f"{MESSAGE} (Triggered internally at x)", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn(f"{MESSAGE} (Triggered internally at x)", UserWarning, stacklevel=1)
    assert counter.count == 2 and modes == ["warn", 0]


def test_one_wait_a_step_passes_and_two_fail(
    judging: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_path, "make_corpus", lambda folder: folder)
    counts = [1, 1, 1]
    found = lambda *_: (counts, {"optim.py:3": sum(counts)})  # noqa: E731
    monkeypatch.setattr(hot_path, "syncs_of_steps", found)
    assert wrong(list(hot_path.check_synchronisations(judging).figures)) == []
    counts[1] = 2
    finding = hot_path.check_synchronisations(judging)
    assert wrong(list(finding.figures)) == ["OPT, waits of a step", "LLaMA, waits of a step"]
    assert "`optim.py:3`, 4 times" in finding.text


def test_a_save_that_stalls_training_fails() -> None:
    assert wrong(hot_path.stall_figures(0.05, 1.0, judge=True)) == []
    assert wrong(hot_path.stall_figures(0.06, 1.0, judge=True)) == ["stall / save"]
    assert wrong(hot_path.stall_figures(0.06, 1.0, judge=False)) == []


@pytest.mark.parametrize(
    ("graphs", "losses", "failed"),
    [
        ([0, 2, 2, 2, 2, 2], [1.0], []),
        ([0, 2, 2, 2, 2, 3], [1.0], ["graphs compiled after it"]),
        ([0, 0, 0, 0, 0, 0], [1.0], ["graphs before the first swap"]),
        ([0, 2, 2, 2, 2, 2], [1.1], ["difference of the loss"]),
    ],
)
def test_a_recompilation_no_compilation_or_another_loss_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch, graphs: list[int], losses: list[float],
    failed: list[str],
) -> None:  # fmt: skip
    """Batches 0 to 4, a swap after step 4: the count before batch 3 is the last before it."""
    counts = iter(graphs)
    monkeypatch.setattr(hot_path, "compiled_graphs", lambda: next(counts))

    def train(config: Any, watch: Any = None) -> Any:
        for number in range(5 if watch else 0):
            watch(number)
        return a_run(losses if watch else [1.0])

    monkeypatch.setattr(hot_path, "train_here", train)
    figures = hot_path.compiled_against_eager(place, place.folder, "torch")
    assert wrong(figures) == [f"torch, {name}" for name in failed]


# -- backends --------------------------------------------------------------------------------


def test_a_backend_with_other_losses_or_none_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"one CPU process": {1: 2.0}, "torch": {1: 2.0}, "FSDP2": {1: 2.0 + 1e-4}}
    monkeypatch.setattr(equivalence, "make_corpus", lambda folder: folder)
    monkeypatch.setattr(equivalence, "require_package", lambda *_, **__: None)

    def losses_of(place: Place, layout: Any, corpus: Path, *, device: str) -> Any:
        found = answers.get(layout.name)
        return found, "" if found else "exit codes [1]"

    monkeypatch.setattr(equivalence, "losses_of", losses_of)
    finding = equivalence.check_backends(place)
    names = [
        f"{name}, difference of the loss" for name in ("FSDP2", *map("ZeRO-{}".format, range(4)))
    ]
    assert wrong(list(finding.figures)) == names
    assert "ZeRO-3:\n\n```\nexit codes [1]" in finding.text
    (megatron,) = [f for f in finding.figures if f.name == "Megatron"]
    assert megatron.value == "left out: Megatron needs a GPU"


def test_layouts_of_more_gpus_than_there_are_are_left_out(place: Place) -> None:
    (hsdp,) = [layout for layout in equivalence.TOGETHER if layout.name == "HSDP"]
    assert equivalence.cannot_run(place, hsdp) == "4 GPUs needed"
    assert equivalence.cannot_run(replace(place, gpus=4), hsdp) is None


# -- failures --------------------------------------------------------------------------------


def test_a_failure_that_is_not_named_or_too_slow_fails(tmp_path: Path) -> None:
    assert failures.says("x", "rank 1 died", ("rank 1",)).ok
    figure = failures.says("x", "something died", ("rank 1",))
    assert not figure.ok and figure.value == "does not say rank 1"
    (tmp_path / "logs").mkdir()
    stacks = tmp_path / "logs" / "stacks_rank_00000.txt"
    stacks.write_text('nothing has moved: rank 0\n  File "hanging_run.py", line 3')
    assert wrong(failures.hang_figures(tmp_path, 1, 20.0, "")) == []
    assert wrong(failures.hang_figures(tmp_path, None, 70.0, "")) == [
        "exit code",
        "seconds from the hang to the end",
    ]
    stacks.unlink()
    assert wrong(failures.hang_figures(tmp_path, 1, 20.0, "")) == ["the verdict", "stack traces"]
