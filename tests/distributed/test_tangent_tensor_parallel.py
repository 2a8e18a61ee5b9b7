"""The tangent form under FSDP2 with tensor parallelism: ranks as 2 x 2 against one process, exact
resume, a checkpoint that moves to one process, and faults that show."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from run_settings import CLIPPED, DOUBLE, RECOMPUTED

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble, distance
from spectral_scale.testing.tiny import one_process_group, tiny_config, train_tiny

STEPS, STOP, BATCH, WORLD = 5, 3, 12, 4  # swaps after 2 and 4: stopped inside an iteration
SETTINGS: dict[str, Any] = {
    "spectral__form": "tangent",
    "spectral__steps_per_iteration": 2,
    "spectral__iteration_warmup_steps": 1,
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full updates
} | CLIPPED
TWO_BY_TWO = {"parallel__backend": "fsdp2", "parallel__tensor_parallel": 2}
RANDOM, SVD = DOUBLE | {"spectral__basis": "random"}, DOUBLE | {"spectral__basis": "svd"}
LLAMA = {"model__name": "llama-60m"}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "random": (RANDOM, 3),
    "unmerged": (RANDOM, 1),
    "svd, base replicated": (SVD | {"parallel__residual": "replicated"}, 1),
    "llama, recomputed": (RANDOM | LLAMA | RECOMPUTED, 1),
    "fp32": ({"train__precision": "fp32"}, 1),
}
"""Settings, and micro-batches a step. In these sizes every product forms its weight, but where it
is told not to."""

Run = tuple[Any, int | None]
Results = dict[str, dict[str, Any]]


def unmerged() -> Iterator[Any]:
    yield patch("spectral_scale.methods.tangent.product.forms_weight", lambda *_: False)


def without_the_sum_in_the_bottleneck() -> Iterator[Any]:
    target = "spectral_scale.backends.fsdp2.tensor_parallel.start_all_reduce"
    yield patch(target, lambda tensor, group: tensor.detach().clone)


def unmerged_without_the_sum_in_the_bottleneck() -> Iterator[Any]:
    yield from unmerged()
    yield from without_the_sum_in_the_bottleneck()


def with_other_bases_on_one_rank() -> Iterator[Any]:
    """What the last rank holds of bases has its columns in another order."""
    import torch

    from spectral_scale.methods.tangent.swap import TangentSwap
    from spectral_scale.parallel.dtensor_collectives import local

    scatter = TangentSwap.scatter

    def faulty(swap: TangentSwap) -> None:
        scatter(swap)
        if swap.collective.rank == WORLD - 1:
            with torch.no_grad():
                for layer in swap.layers.values():
                    local(layer.v0).copy_(local(layer.v0).roll(1, dims=1))

    yield patch.object(TangentSwap, "scatter", faulty)


FAULTS = {
    f.__name__: f
    for f in (
        without_the_sum_in_the_bottleneck,
        unmerged_without_the_sum_in_the_bottleneck,
        with_other_bases_on_one_rank,
    )
}
CHANGED = FAULTS | {"unmerged": unmerged}


def train_all(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Results by name, with what this rank holds that others hold, too, or the error's text."""
    from spectral_scale.errors import SpectralScaleError

    found: dict[str, Any] = {}
    with one_process_group():
        for name, run in runs.items():
            with ExitStack() as stack:
                for change in CHANGED[name]() if name in CHANGED else ():
                    stack.enter_context(change)
                try:
                    found[name] = train_keeping_replicas(*run)
                except SpectralScaleError as error:
                    found[name] = str(error)
    return found


def train_keeping_replicas(config: Any, stop: int | None) -> dict[str, Any]:
    from spectral_scale.backends.fsdp2.backend import FSDP2Backend

    replicas: dict[str, Any] = {}
    close = FSDP2Backend.close

    def closing(backend: FSDP2Backend, *, failed: bool = False) -> None:
        for name, tensor, piece in backend.replicated():
            replicas[f"{name}/{piece}"] = tensor.clone().numpy()
        close(backend, failed=failed)

    with patch.object(FSDP2Backend, "close", closing):
        return train_tiny(config, stop) | {"replicas": replicas}


@pytest.fixture(scope="module")
def ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank and name: cases, the run that stops and the same continued by fresh processes, and
    faults. Rank -1 is one process: cases, and the stopped run continued."""
    folder = tmp_path_factory.mktemp("tangent")

    def configured(name: str, changes: Mapping[str, Any], copies: int, parts: int = 1) -> Any:
        micro = {"train__micro_batch_size": BATCH // (copies * parts)}
        return tiny_config(corpus, folder / name, **(SETTINGS | micro | dict(changes)))

    def single(changes: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in changes.items() if not k.startswith("parallel__")}

    cases = {n: (configured(n, c | TWO_BY_TWO, 2, p), None) for n, (c, p) in CASES.items()}
    parts = configured("stopped", RANDOM | TWO_BY_TWO, 2, 3)
    faults = {n: (configured(n, RANDOM | TWO_BY_TWO, 2, 3), None) for n in FAULTS}
    first = run_distributed(
        train_all, WORLD, cases | {"stopped": (parts, STOP)} | faults, timeout_seconds=300
    )
    shutil.copytree(folder / "stopped", folder / "moved")
    again = run_distributed(train_all, WORLD, {"resumed": (parts, None)}, timeout_seconds=300)
    alone = {n: (configured(f"{n}, alone", single(c), 2), None) for n, (c, _) in CASES.items()}
    alone["moved"] = (configured("moved", RANDOM, 2), None)
    [expected] = run_distributed(train_all, 1, alone, timeout_seconds=300)
    return [*(a | b for a, b in zip(first, again, strict=True)), expected]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, ranks: list[Results]) -> None:
    """Losses, trained tensors, moments and step counts, the owners' weights, the same bases."""
    *shared, expected = (rank[name] for rank in ranks)
    found = distance(shared, expected)
    exact = name != "fp32"
    assert found.loss < (1e-12 if exact else 1e-5), found
    assert max(found.weights, found.factors) < (1e-9 if exact else 1e-3), found
    assert found.moments < 1e-9 or not exact, found
    assert found.steps_equal
    kept, reference = assemble(shared), assemble([expected])
    weights = [key for key in reference if key.startswith("base/")]
    bases = [key for key in reference if key.startswith("basis/")]
    gaps = {key: float(np.abs(kept[key] - reference[key]).max()) for key in weights + bases}
    assert len(weights) == (14 if "llama" in name else 12)
    assert max(gaps.values()) < (1e-9 if exact else 1e-3), gaps
    assert "svd" in name or all(gaps[key] == 0.0 for key in bases)
    assert any("layers.1" in key and "@" in key for key in shared[3]["tensors"]), "nothing was cut"


def test_bases_are_equal_bit_for_bit(ranks: list[Results]) -> None:
    """Bases and factors that tensor parallelism leaves whole."""
    for name in ("random", "svd, base replicated", "fp32"):
        held = [rank[name]["replicas"] for rank in ranks[:-1]]
        for a, b in combinations(held, 2):
            assert all(np.array_equal(a[key], b[key]) for key in a.keys() & b.keys())
        for left, right in ((0, 1), (2, 3)):
            common = held[left].keys() & held[right].keys()
            for leaf in ("q_proj.v0", "q_proj.c", "fc2.u0", "fc2.d"):
                assert any(f".{leaf}/" in key for key in common), leaf


def test_resume_is_bit_exact(ranks: list[Results]) -> None:
    """Stopped inside an iteration; fresh processes go on."""
    for rank in ranks[:-1]:
        before, after, expected = rank["stopped"], rank["resumed"], rank["random"]
        assert before["step"] == STOP
        assert before["losses"] | after["losses"] == expected["losses"]
        assert after["tensors"].keys() == expected["tensors"].keys()
        for key, value in expected["tensors"].items():
            assert np.array_equal(after["tensors"][key], value), key


def test_one_process_goes_on_with_what_four_ranks_saved(ranks: list[Results]) -> None:
    """A checkpoint holds logical tensors."""
    moved, expected = ranks[-1]["moved"], ranks[0]["random"]["losses"]
    assert sorted(moved["losses"]) == list(range(STOP + 1, STEPS + 1))
    assert all(abs(loss - expected[step]) < 1e-9 for step, loss in moved["losses"].items())
    assert distance([moved], ranks[-1]["random"] | {"losses": moved["losses"]}).weights < 1e-9


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name: str, ranks: list[Any]) -> None:
    """By the run, where copies part ways or bases are not those drawn; else by comparison with one
    process."""
    results = [rank[name] for rank in ranks[:-1]]
    if isinstance(results[0], str):
        assert "differs between" in results[0] or "installed 48 of 96 vectors" in results[0]
        return
    found = distance(results, ranks[-1]["random"])
    assert max(found.loss, found.weights, found.factors) > 1e-9
