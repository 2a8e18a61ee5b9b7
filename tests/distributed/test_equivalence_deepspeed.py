"""DeepSpeed's ZeRO stages against one process: losses, triplets, weights, moments, and twins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import BF16, CLIPPED, FACTORED, OFFLOADED, UNCLIPPED

from spectral_scale.testing.distributed import RankError, run_distributed
from spectral_scale.testing.equivalence import Distance, assemble, distance
from spectral_scale.testing.tiny import tiny_config, train_in_turn, train_tiny

STEPS = 10  # swaps after 4 and 8, the second with a re-SVD
BATCH = 48
EPS = {"optimizer__eps": 1e-5}  # above rounding, which Adam would blow up to full updates

Alone = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def alone(train_alone: Alone) -> Alone:
    """One process's result for a set of changes."""
    settings = {"train__steps": STEPS, "train__global_batch_size": BATCH} | EPS
    settings |= {"train__micro_batch_size": BATCH // 2}
    return lambda changes: train_alone(settings | changes)


def zero_config(
    corpus: Path, run_dir: Path, stage: int, world: int, accumulation: int, **changes: Any
) -> Any:
    settings: dict[str, Any] = {
        "parallel__backend": "deepspeed",
        "parallel__zero_stage": stage,
        "train__steps": STEPS,
        "train__global_batch_size": BATCH,
        "train__micro_batch_size": BATCH // (world * accumulation),
    }
    return tiny_config(corpus, run_dir, **(settings | EPS | changes))


CASES = {
    1: [(2, 4, CLIPPED), (3, 1, UNCLIPPED)],
    2: [(3, 1, UNCLIPPED | FACTORED)],
    3: [
        *((stage, 4, CLIPPED) for stage in range(4)),
        *((stage, 4, CLIPPED | OFFLOADED) for stage in (2, 3)),
    ],
    4: [(2, 1, UNCLIPPED | FACTORED)],
}
"""World size -> stage, accumulation, changes; trained by the same processes, which take longer to
start than to train."""


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.fast), 3, 4])
def test_equals_one_process(world: int, corpus: Path, tmp_path: Path, alone: Alone) -> None:
    runs = [
        (zero_config(corpus, tmp_path / str(i), stage, world, accumulation, **changes), None)
        for i, (stage, accumulation, changes) in enumerate(CASES[world])
    ]
    ranks = run_distributed(train_in_turn, world, runs, timeout_seconds=240)
    for i, case in enumerate(CASES[world]):
        results, expected = [rank[i] for rank in ranks], alone(case[2])
        found = distance(results, expected)
        assert is_equal(found), (case, found)
        assert_norms(results[0], expected)


def is_equal(found: Distance) -> bool:
    return (
        found.loss < 1e-5
        and found.weights < 1e-3  # an update; a re-SVD may turn bases by rounding
        and found.steps_equal
        and found.indices_equal
    )


def assert_norms(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Norms of the gradients before clipping, by kind of group, at every step."""
    for (_, line), (_, reference) in zip(found["lines"], expected["lines"], strict=True):
        for key in (k for k in reference if k.startswith("train/grad_norm")):
            assert line[key] == pytest.approx(reference[key], rel=1e-3), key


@pytest.mark.parametrize(("stage", "method"), [(2, "full"), (2, "lora"), (3, "relora")])
def test_methods(stage: int, method: str, corpus: Path, tmp_path: Path, alone: Alone) -> None:
    """The other methods of the harness, across a merge of ReLoRA*."""
    changes = {"spectral__method": method}
    config = zero_config(corpus, tmp_path, stage, 2, 2, **changes)
    found, expected = run_distributed(train_tiny, 2, config, timeout_seconds=120), alone(changes)
    losses, reference = found[0]["losses"], expected["losses"]
    assert max(abs(losses[s] - reference[s]) for s in reference) < 1e-5


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(1, {}), (2, {}), (3, OFFLOADED)],
    ids=["BF16_Optimizer", "2", "3+offload"],
)
def test_bf16_trains_fp32_masters(
    stage: int, changes: dict[str, Any], corpus: Path, tmp_path: Path, alone: Alone
) -> None:
    """The module computes in bf16 throughout (the torch backend only in products), so losses are
    near, not equal; masters are exact where no bf16 value enters: before the first step."""
    config = zero_config(corpus, tmp_path, stage, 3, 4, **BF16, **changes)
    ranks, expected = run_distributed(train_tiny, 3, config, timeout_seconds=120), alone(BF16)
    losses, reference = ranks[0]["losses"], expected["losses"]
    assert max(abs(losses[s] - reference[s]) for s in reference) < 5e-3
    masters = assemble(ranks)
    rounded = [n for n, t in masters.items() if n.startswith("model/") and is_bf16(t)]
    assert not [n for n in rounded if not n.endswith(("bias", "norm.weight", "sigma"))], rounded
    for name in (n for n in masters if n.startswith("model/") and n.endswith((".u", ".v"))):
        norms = np.linalg.norm(masters[name].astype(np.float64), axis=0)
        np.testing.assert_allclose(norms, 1.0, atol=1e-6, err_msg=name)


def is_bf16(values: np.ndarray) -> bool:
    """Whether every element survives rounding to bf16."""
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


# -- twins: each breaks one thing that the backend relies on, and must be noticed ------------


def write_only_the_weight(store: Any) -> None:
    store.write_master = lambda fragment, part: None


def write_only_the_master(store: Any) -> None:
    store.write_weight = lambda parameter, part: None


def skip_the_step_reset(store: Any) -> None:
    from spectral_scale.backends.deepspeed import store as zero_store

    zero_store.set_step = lambda *_: None


def skip_the_reduction_of_norms(store: Any) -> None:
    """Each rank divides columns by the norm of its own piece."""
    from spectral_scale.backends.deepspeed.retraction import Directions

    Directions._sum_over_ranks = lambda self, squares: squares  # type: ignore[method-assign]


def average_the_gradients(store: Any) -> None:
    """A loss that is averaged, not summed, over ranks."""
    from spectral_scale.backends.deepspeed.backend import DeepSpeedBackend

    plain = DeepSpeedBackend.backward
    DeepSpeedBackend.backward = lambda self, loss: plain(self, loss / 2)  # type: ignore[method-assign]


def sample_by_rank(store: Any) -> None:
    from spectral_scale.methods.sst import bank

    plain, rank = bank.sample_triplets, store.collective.rank
    bank.sample_triplets = lambda *a, **k: plain(*a, **(k | {"seed": k["seed"] + rank}))


TWINS = [
    (2, write_only_the_weight),
    (3, write_only_the_weight),
    (2, write_only_the_master),
    (3, write_only_the_master),
    (2, skip_the_step_reset),
    (3, skip_the_reduction_of_norms),
    (2, average_the_gradients),
    (2, sample_by_rank),
]


def train_broken(config: Any, twin: Callable[[Any], None]) -> dict[str, Any]:
    """Train with something broken from the moment that the store is handed out."""
    from spectral_scale.backends.deepspeed.backend import DeepSpeedBackend

    hand_out = DeepSpeedBackend.store

    def broken(backend: DeepSpeedBackend) -> Any:
        store = hand_out(backend)
        twin(store)
        return store

    DeepSpeedBackend.store = broken  # type: ignore[method-assign]
    return train_tiny(config)


def is_noticed(
    train: Callable[..., Any], alone: dict[str, Any], *arguments: Any, message: str
) -> bool:
    """Whether a run stops with that message, or differs from the right one."""
    try:
        ranks = run_distributed(train, 2, *arguments, timeout_seconds=120)
    except RankError as error:
        assert message in str(error)
        return True
    return not is_equal(distance(ranks, alone))


@pytest.mark.parametrize(("stage", "twin"), TWINS)
def test_a_broken_twin_shows(
    stage: int, twin: Callable[[Any], None], corpus: Path, tmp_path: Path, alone: Alone
) -> None:
    config = zero_config(corpus, tmp_path, stage, 2, 1, **CLIPPED)
    assert is_noticed(train_broken, alone(CLIPPED), config, twin, message="not finite")


def train_round_robin(config: Any) -> dict[str, Any]:
    """Let round_robin_gradients through the two places that refuse it."""
    from spectral_scale.backends.deepspeed import partitions as zero_layout
    from spectral_scale.config import resolve

    plain = resolve.resolve_deepspeed

    def with_round_robin(*arguments: Any, **keywords: Any) -> Any:
        settings = plain(*arguments, **keywords)
        settings.initialize["zero_optimization"]["round_robin_gradients"] = True
        return settings

    resolve.resolve_deepspeed = with_round_robin
    zero_layout.refuse_round_robin = lambda optimizer: None
    return train_tiny(config)


def test_round_robin_gradients_would_show(corpus: Path, tmp_path: Path, alone: Alone) -> None:
    """Why they are refused: DeepSpeed's map of fragments does not follow its buffers."""
    config = zero_config(corpus, tmp_path, 2, 2, 1, **CLIPPED)
    message = "exceeds dimension size"
    assert is_noticed(train_round_robin, alone(CLIPPED), config, message=message)
