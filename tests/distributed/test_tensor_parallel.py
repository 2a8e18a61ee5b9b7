"""FSDP2 with tensor parallelism against one process: ranks as 2 x 2, 4 in one line, and faults.

The runs of a test share one set of processes; each forms its process group anew.
"""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from run_settings import RECOMPUTED

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_tiny

BATCH = 24
SETTINGS: dict[str, Any] = {
    "train__steps": 6,  # swaps after 2 and 4, the second with a re-SVD
    "spectral__steps_per_iteration": 2,
    "train__global_batch_size": BATCH,
    "train__precision": "fp64",
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full steps
    "optimizer__spectral_lr": 1e-4,  # so low that sigma stays above zero
    "optimizer__clip_grad_norm": 0.1,  # below every kind's gradient norm but that of sigma
}
TWO_BY_TWO = {"parallel__backend": "fsdp2", "parallel__tensor_parallel": 2}
FOUR = {"parallel__backend": "fsdp2", "parallel__tensor_parallel": 4}
KEPT = {"spectral__extra_sigma": 5, "spectral__boundary_moments": "keep_redrawn"}
FROD: dict[str, Any] = {
    "spectral__method": "frod",
    "spectral__sparsity": 0.05,
    # All but fc2, whose short stack has a null space, where any basis is as good as another.
    "spectral__targets": "[q_proj,k_proj,v_proj,out_proj,fc1]",
}
CASES: dict[str, dict[str, Any]] = {
    "dense": TWO_BY_TWO | {"spectral__method": "full"},
    "residual": TWO_BY_TWO,
    "residual, replicated, kept": TWO_BY_TWO | KEPT | {"parallel__residual": "replicated"},
    "factored": TWO_BY_TWO | {"spectral__storage": "factored"},
    "llama, recomputed": TWO_BY_TWO | RECOMPUTED | {"model__name": "llama-60m"},
    "four": FOUR | {"model__num_heads": 4},
    "frod": FOUR | FROD | {"model__num_heads": 4},
    "frod, frozen": TWO_BY_TWO | FROD | {"spectral__train_dense": False},
    "fp32": TWO_BY_TWO | {"train__precision": "fp32", "optimizer__clip_grad_norm": 0},
    "fp32, factored": TWO_BY_TWO | {"train__precision": "fp32", "spectral__storage": "factored"},
}
ACCUMULATED = ("factored", "residual", "frod, frozen")
DROPPED: dict[str, Any] = {"parallel__tensor_parallel": 2, "model__dropout": 0.1}
BF16: dict[str, Any] = {"parallel__tensor_parallel": 2, "train__precision": "bf16"}


def single(changes: dict[str, Any]) -> dict[str, Any]:
    """The settings that matter to one process."""
    return {k: v for k, v in changes.items() if not k.startswith("parallel__")}


def turns(configs: dict[str, Any]) -> dict[str, tuple[Any, int]]:
    """Each run's configuration, and the port where its ranks meet."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in configs]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [int(one.getsockname()[1]) for one in sockets]
    return {name: (configs[name], port) for name, port in zip(configs, ports, strict=True)}


def train_all(runs: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    """Train one run after the other, each in a process group of its own."""
    return {name: train_keeping_replicas(*run) for name, run in runs.items()}


def train_keeping_replicas(config: Any, port: int) -> dict[str, Any]:
    """`train_tiny`, and at its end what this rank holds that others hold, too."""
    from spectral_scale.backends.fsdp2.backend import FSDP2Backend

    replicas: dict[str, Any] = {}
    close = FSDP2Backend.close

    def closing(backend: FSDP2Backend, *, failed: bool = False) -> None:
        for name, tensor, piece in backend.replicated():
            replicas[f"{name}/{piece}"] = tensor.clone().numpy()
        close(backend, failed=failed)

    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(port)
    with patch.object(FSDP2Backend, "close", closing):
        return train_tiny(config) | {"replicas": replicas}


def by_run(ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Distance of every case from one process."""
    folder = tmp_path_factory.mktemp("runs")
    alone, shared = {}, {}
    for name, changes in CASES.items():
        ranks = 1 if name in ("four", "frod") else 2
        micro = BATCH // (ranks * (3 if name in ACCUMULATED else 1))
        settings = SETTINGS | {"train__micro_batch_size": BATCH // 2} | single(changes)
        alone[name] = tiny_config(corpus, folder / f"alone {name}", **settings)
        settings = SETTINGS | {"train__micro_batch_size": micro} | changes
        shared[name] = tiny_config(corpus, folder / f"shared {name}", **settings)
    expected = run_distributed(train_all, 1, turns(alone), timeout_seconds=200)[0]
    found = by_run(run_distributed(train_all, 4, turns(shared), timeout_seconds=250))
    return lambda name: (distance(found[name], expected[name]), found[name])


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, runs: Callable[[str], Any]) -> None:
    """Losses, weights, moments, step counts, triplets; in single precision, losses to 1e-5."""
    found, ranks = runs(name)
    if name.startswith("fp32"):
        assert found.loss < 1e-5
        assert found.weights < 1e-4
    else:
        assert found.loss < 1e-12
        assert max(found.weights, found.factors, found.moments) < 1e-9
    assert found.steps_equal
    assert found.indices_equal
    pieces = [k for k in ranks[3]["tensors"] if "layers.1" in k and "@" in k]
    assert pieces or name == "frod, frozen", "nothing was cut"  # what it cuts is not saved


def test_replicas_are_equal_bit_for_bit(runs: Callable[[str], Any]) -> None:
    """What tensor parallelism leaves whole, and what a frozen matrix has copies of."""
    for name in ("residual, replicated, kept", "fp32", "fp32, factored"):
        held = [rank["replicas"] for rank in runs(name)[1]]
        for a, b in combinations(held, 2):
            assert all(np.array_equal(a[k], b[k]) for k in a.keys() & b.keys())
        for left, right in ((0, 1), (2, 3)):
            assert len(held[left].keys() & held[right].keys()) > 10


def test_bf16_and_dropout(corpus: Path, tmp_path: Path) -> None:
    """The masks are those of one process; in bf16, losses differ by rounding only."""
    alone, shared = {}, {}
    for name, changes in {"dropped": DROPPED, "bf16": BF16}.items():
        settings = SETTINGS | {"train__micro_batch_size": BATCH // 2}
        alone[name] = tiny_config(corpus, tmp_path / f"a {name}", **(settings | single(changes)))
        settings |= {"parallel__backend": "fsdp2"} | changes
        shared[name] = tiny_config(corpus, tmp_path / f"b {name}", **settings)
    expected = run_distributed(train_all, 1, turns(alone), timeout_seconds=100)[0]
    found = by_run(run_distributed(train_all, 2, turns(shared), timeout_seconds=100))
    dropped = distance(found["dropped"], expected["dropped"])
    assert max(dropped.loss, dropped.weights, dropped.moments) < 1e-9
    assert distance(found["bf16"], expected["bf16"]).loss < 1e-3


def test_state_moves_between_backends(corpus: Path, tmp_path: Path) -> None:
    """Stopped at 3 of 6 steps, inside an iteration: resumed bit for bit as it was, and elsewhere
    as if undisturbed; what one process saved goes on in parts."""
    common = SETTINGS | {"train__micro_batch_size": 6}
    whole = tiny_config(corpus, tmp_path / "whole", **(common | TWO_BY_TWO))
    broken = tiny_config(corpus, tmp_path / "broken", **(common | TWO_BY_TWO))
    straight = run_distributed(train_tiny, 4, whole)
    first = run_distributed(train_tiny, 4, broken, 3)
    assert first[0]["step"] == 3
    shutil.copytree(tmp_path / "broken", tmp_path / "plain")
    second = run_distributed(train_tiny, 4, broken)
    assert first[0]["losses"] | second[0]["losses"] == straight[0]["losses"]
    for rank, expected in zip(second, straight, strict=True):
        tensors = expected["tensors"]
        assert rank["tensors"].keys() == tensors.keys()
        assert all(np.array_equal(rank["tensors"][k], v) for k, v in tensors.items())
    plain = tiny_config(corpus, tmp_path / "plain", **common)
    alone = run_distributed(train_tiny, 1, plain, 1)[0]  # one step, then saved again
    again = run_distributed(
        train_tiny, 2, tiny_config(corpus, tmp_path / "plain", **(common | TWO_BY_TWO))
    )[0]
    losses = first[0]["losses"] | alone["losses"] | again["losses"]
    assert sorted(losses) == list(range(1, 7))
    assert all(abs(loss - straight[0]["losses"][s]) < 1e-9 for s, loss in losses.items())


def without_the_sum_in_the_bottleneck() -> Iterator[Any]:
    target = "spectral_scale.backends.fsdp2.tensor_parallel.start_all_reduce"
    yield patch(target, lambda tensor, group: tensor.detach().clone)


def with_the_sum_doubled() -> Iterator[Any]:
    from spectral_scale.parallel.tensor_parallel_regions import all_reduce

    target = "spectral_scale.backends.fsdp2.tensor_parallel.start_all_reduce"
    yield patch(target, lambda tensor, group: lambda: all_reduce(all_reduce(tensor, group), group))


def without_the_sum_of_input_gradients() -> Iterator[Any]:
    yield patch("spectral_scale.backends.fsdp2.tensor_parallel.copy_to_region", lambda x, group: x)


def with_norms_counted_on_every_rank() -> Iterator[Any]:
    """Clipping as if each rank held other parameters."""
    import torch.distributed as dist

    def faulty(values: Any, layouts: Any) -> Any:
        for value in values:
            dist.all_reduce(value)
        return values

    yield patch("spectral_scale.backends.fsdp2.backend.sum_over_shards", faulty)


def with_columns_normalised_by_part() -> Iterator[Any]:
    target = "spectral_scale.backends.fsdp2.store.sum_over_shards"
    yield patch(target, lambda values, layouts: list(values))


def with_all_heads_on_every_rank() -> Iterator[Any]:
    target = "spectral_scale.backends.fsdp2.tensor_parallel._take_local_heads"
    yield patch(target, lambda model, parts: None)


FAULTS = {
    f.__name__: f
    for f in (
        without_the_sum_in_the_bottleneck,
        with_the_sum_doubled,
        without_the_sum_of_input_gradients,
        with_norms_counted_on_every_rank,
        with_columns_normalised_by_part,
        with_all_heads_on_every_rank,
    )
}


def train_with_faults(runs: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    """Results, or what the run itself found to be wrong."""
    from spectral_scale.errors import HealthError
    from spectral_scale.parallel.group import leave_group

    found: dict[str, Any] = {}
    for name, run in runs.items():
        with ExitStack() as stack:
            for fault in FAULTS[name]() if name in FAULTS else ():
                stack.enter_context(fault)
            try:
                found[name] = train_keeping_replicas(*run)
            except HealthError as error:
                found[name] = str(error)
                leave_group()
    return found


@pytest.fixture(scope="module")
def faulty(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faulty")
    settings = SETTINGS | {"train__steps": 4, "train__micro_batch_size": 12, "model__num_layers": 1}
    alone = tiny_config(corpus, folder / "alone", **settings)
    expected = run_distributed(train_tiny, 1, alone)[0]
    configs = {
        name: tiny_config(corpus, folder / name, **(settings | TWO_BY_TWO))
        for name in ("nothing", *FAULTS)
    }
    ranks = by_run(run_distributed(train_with_faults, 2, turns(configs), timeout_seconds=200))
    return {n: r[0] if isinstance(r[0], str) else distance(r, expected) for n, r in ranks.items()}


@pytest.mark.parametrize("name", ["nothing", *FAULTS])
def test_fault_is_seen(name: str, faulty: dict[str, Any]) -> None:
    """By the run, where copies of a factor part ways; by comparison with one process."""
    found = faulty[name]
    if isinstance(found, str):
        assert name != "nothing"
        assert "differs between rank 0 and 1" in found
        return
    equal = max(found.loss, found.weights, found.factors, found.moments) < 1e-9
    assert equal is (name == "nothing")
