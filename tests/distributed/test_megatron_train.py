"""Runs on megatron-core against one process: losses, triplets, norms, weights, checkpoints."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from run_settings import CLIPPED, FACTORED, PLAIN_ADAM, RECOMPUTED

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble, distance
from spectral_scale.testing.megatron import train_in_turn_on_cpu
from spectral_scale.testing.tiny import save_tiny_llama, tiny_config, train_in_turn

STEPS, BATCH, STOP = 10, 16, 6  # swaps after 4 and 8, the second with a re-SVD
SETTINGS: dict[str, Any] = {
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "model__num_heads": 4,
    "health__replica_interval": 1,  # ranks that hold the same compare it after every step
    # Above rounding, which Adam would blow up to full steps.
    "optimizer__eps": 1e-5,
    # So low that sigma stays above zero: two zeros leave the basis of a re-SVD to rounding.
    "optimizer__spectral_lr": 1e-4,
}
LLAMA = {"model__name": "llama-60m", "model__num_heads": 4, "model__ffn_size": 96}
GROUPED = {"grouped": True}  # a LLaMA with 8 heads in 4 groups, from a folder
SEQUENCE = {"parallel__sequence_parallel": True}
EXTRA = {"spectral__extra_sigma": 5}
PER_STEP = {"parallel__factor_gradients": "per_step"}


@dataclass(frozen=True)
class Layout:
    """Who holds what."""

    tensor: int
    data: int
    changes: tuple[tuple[str, Any], ...] = ()
    accumulation: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.data

    def settings(self) -> dict[str, Any]:
        found = {
            "parallel__backend": "megatron",
            "parallel__tensor_parallel": self.tensor,
            "train__micro_batch_size": BATCH // self.data // self.accumulation,
        }
        return SETTINGS | found | dict(self.changes)


def layout(tensor: int, data: int, accumulation: int = 1, **changes: Any) -> Layout:
    return Layout(tensor, data, tuple(changes.items()), accumulation)


LAYOUTS = [
    layout(1, 1, **FACTORED),
    layout(1, 2, 2, **CLIPPED),
    layout(1, 2, **FACTORED, **PLAIN_ADAM),
    layout(2, 1),
    layout(2, 1, **SEQUENCE, **FACTORED, **RECOMPUTED),
    layout(2, 1, **FACTORED, **PER_STEP, **CLIPPED),
    layout(4, 1, 2, **SEQUENCE, **CLIPPED, **EXTRA),
    layout(2, 2, **FACTORED, **CLIPPED),
    layout(2, 2, **SEQUENCE, **PLAIN_ADAM),
    layout(2, 2, 2, **SEQUENCE, **PER_STEP, **RECOMPUTED, **GROUPED),
    layout(4, 1, **SEQUENCE, **FACTORED, **LLAMA),
    layout(4, 2),
]
HALF = layout(2, 1, **SEQUENCE, **RECOMPUTED, train__precision="bf16")
BROKEN = {
    "skip the tensor-parallel sum": layout(2, 1),
    "sum twice": layout(2, 1, **SEQUENCE, **CLIPPED),
    "count the norm on every rank": layout(2, 1, **CLIPPED),
    "draw for each part": layout(2, 1),
}


def _alone_changes(changes: dict[str, Any]) -> dict[str, Any]:
    ours = ("parallel__", "model__activation_checkpointing")
    kept = {k: v for k, v in changes.items() if not k.startswith(ours)}
    return kept | {"train__micro_batch_size": BATCH // 2, "health__replica_interval": 0}


Case = tuple[Layout, str | None]
"""A layout and what is broken in it."""


def chosen_cases(request: pytest.FixtureRequest) -> list[Case]:
    """The cases of the tests of this file that were chosen to run."""
    found: list[Case] = []
    for item in request.session.items:
        if item.path != request.path or not isinstance(item, pytest.Function):
            continue
        if item.originalname == "test_bf16_products_train_as_on_one_process":
            found.append((HALF, None))
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if "wanted" in given:
            found.append((given["wanted"], None))
        if "fault" in given:
            found.append((BROKEN[given["fault"]], given["fault"]))
    return found


class Runs:
    """Results of runs, those of a world size trained by the same processes.

    Args:
        corpus: what they train on.
        folder: where they write.
        cases: what will be asked for.
    """

    def __init__(self, corpus: Path, folder: Path, cases: list[Case]) -> None:
        self.corpus, self.folder, self.cases = corpus, folder, cases
        self.grouped = save_tiny_llama(folder / "grouped", corpus)
        self._alone: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._found: dict[Case, list[dict[str, Any]]] = {}

    def config(self, name: str, **changes: Any) -> Any:
        grouped = self.grouped if changes.pop("grouped", False) else {}
        return tiny_config(self.corpus, self.folder / name, **(changes | grouped))

    def alone(self, changes: dict[str, Any]) -> dict[str, Any]:
        self._train_in_one_process()
        return self._alone[self._key(changes)]

    def _train_in_one_process(self) -> None:
        """What the others are compared with, and the layouts of one rank."""
        if self._alone:
            return
        keys = sorted({self._key(x.settings()) for x, _ in self.cases}, key=str)
        layouts = [x for x, _ in self.cases if x.world == 1]
        changes = [dict(key) for key in keys] + [x.settings() for x in layouts]
        runs = [(self.config(f"one{i}", **c), None) for i, c in enumerate(changes)]
        results = run_distributed(train_in_turn_on_cpu, 1, runs, timeout_seconds=250)[0]
        self._alone = dict(zip(keys, results[: len(keys)], strict=True))
        for one, result in zip(layouts, results[len(keys) :], strict=True):
            self._found[one, None] = [result]

    def found(self, wanted: Layout, fault: str | None = None) -> list[dict[str, Any]]:
        """Results by rank; runs of a world size, sound and broken, share its processes."""
        if wanted.world == 1:
            self._train_in_one_process()
        if (wanted, fault) not in self._found:
            world = wanted.world
            cases = [(x, f) for x, f in self.cases if x.world == world]
            runs = [
                (self.config(f"world{world}-{i}", **x.settings()), None)
                for i, (x, _) in enumerate(cases)
            ]
            faults = {i: f for i, (_, f) in enumerate(cases) if f is not None}
            ranks = run_distributed(train_in_turn_on_cpu, world, runs, faults, timeout_seconds=250)
            for case, results in zip(cases, zip(*ranks, strict=True), strict=True):
                self._found[case] = list(results)
        return self._found[wanted, fault]

    def _key(self, changes: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(sorted(_alone_changes(changes).items()))


def norm_gap(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative difference of a gradient norm at any step."""
    gaps = [0.0]
    for (_, ours), (_, theirs) in zip(found["lines"], expected["lines"], strict=True):
        for key in theirs:
            if key.startswith("train/grad_norm"):
                gaps.append(abs(ours[key] - theirs[key]) / max(theirs[key], 1e-12))
    return max(gaps)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    return Runs(corpus, tmp_path_factory.mktemp("megatron"), chosen_cases(request))


@pytest.mark.parametrize(
    "wanted",
    [pytest.param(w, marks=pytest.mark.fast) if w == layout(2, 1) else w for w in LAYOUTS],
    ids=str,
)
def test_equals_one_process(wanted: Layout, runs: Runs) -> None:
    """And ranks that hold the same held the same bits after every step (replica_interval)."""
    found, expected = runs.found(wanted), runs.alone(wanted.settings())
    gap = distance(found, expected)
    assert gap.loss < 1e-5
    assert gap.weights < 1e-4  # where a gradient is near eps, Adam blows rounding up
    assert gap.steps_equal
    assert gap.indices_equal
    assert norm_gap(found[0], expected) < 1e-3


def test_bf16_products_train_as_on_one_process(runs: Runs) -> None:
    """Products, frozen weights and what ranks send are rounded; trained weights are not."""
    found, expected = runs.found(HALF), runs.alone(HALF.settings())
    gaps = [abs(found[0]["losses"][s] - loss) for s, loss in expected["losses"].items()]
    assert max(gaps) < 1e-3
    kinds = {str(v.dtype) for k, v in found[0]["tensors"].items() if k.endswith((".u", "exp_avg"))}
    assert kinds == {"float32"}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_run_is_seen(fault: str, runs: Runs) -> None:
    """By the comparison of replicas, or by the test above."""
    wanted = BROKEN[fault]
    found, expected = runs.found(wanted, fault), runs.alone(wanted.settings())
    if "error" in found[0]:
        assert "differs between rank" in found[0]["error"]
    else:
        assert distance(found, expected).loss > 1e-5 or norm_gap(found[0], expected) > 1e-2


HOME = layout(2, 2, **SEQUENCE, **CLIPPED)
ELSEWHERE = {
    "tp4": layout(4, 1, **CLIPPED).settings(),
    "tp1": layout(1, 1, **CLIPPED).settings(),
    "torch": SETTINGS | CLIPPED | {"train__micro_batch_size": BATCH // 2},
    "zero2": SETTINGS
    | CLIPPED
    | {
        "parallel__backend": "deepspeed",
        "parallel__zero_stage": 2,
        "train__micro_batch_size": BATCH // 2,
    },
}


def resume_at_home_and_at_tp4(
    whole: Any, saved: Any, again: Any, tp4: Any, folder: Path
) -> list[dict[str, Any]]:
    """Undisturbed; stopped and continued; continued at another tensor-parallel size."""
    import torch.distributed as dist

    from spectral_scale.testing.megatron import megatron_in_one_group
    from spectral_scale.testing.tiny import train_tiny

    with megatron_in_one_group():
        found = [train_tiny(whole)]
        train_tiny(saved, STOP)
        dist.barrier()
        if dist.get_rank() == 0:
            for name in ("again", *ELSEWHERE):
                shutil.copytree(folder / "saved", folder / name)
        dist.barrier()
        return [*found, train_tiny(again), train_tiny(tp4)]


def test_checkpoints_move_between_layouts_and_backends(runs: Runs) -> None:
    """Saved at TP 2 x DP 2, continued there bit for bit, and at TP 4, TP 1, on ZeRO-2 and torch."""
    configs = {name: runs.config(name, **changes) for name, changes in ELSEWHERE.items()}
    at_home = [runs.config(n, **HOME.settings()) for n in ("whole", "saved", "again")]
    ranks = run_distributed(
        resume_at_home_and_at_tp4, 4, *at_home, configs["tp4"], runs.folder, timeout_seconds=200
    )
    whole, again, tp4 = (list(results) for results in zip(*ranks, strict=True))
    alone = [(configs[name], None) for name in ("tp1", "torch")]
    tp1, torch = run_distributed(train_in_turn_on_cpu, 1, alone, timeout_seconds=100)[0]
    zero = run_distributed(train_in_turn, 2, [(configs["zero2"], None)], timeout_seconds=200)
    for rank, resumed in zip(whole, again, strict=True):
        assert resumed["tensors"].keys() == rank["tensors"].keys()
        assert all((resumed["tensors"][k] == v).all() for k, v in rank["tensors"].items())
    losses = {step: loss for step, loss in whole[0]["losses"].items() if step > STOP}
    expected = {"losses": losses, "tensors": assemble(whole)}
    elsewhere = {"tp4": tp4, "tp1": [tp1], "torch": [torch], "zero2": [rank[0] for rank in zero]}
    for name, found in elsewhere.items():
        gap = distance(found, expected)
        assert gap.loss < 1e-5, name
        assert gap.weights < 1e-4, name
        assert gap.steps_equal, name
        assert gap.indices_equal, name
