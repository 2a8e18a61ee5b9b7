"""The spectral filter on FSDP2 with tensor parallelism: one process' numbers, messages, state.

Row-parallel matrices lie in blocks of columns there, and sigma is held by several ranks.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.filters import JOINT, KNN, compare_measures
from spectral_scale.testing.filters import SETTINGS as FILTERED
from spectral_scale.testing.tiny import (
    one_process_group,
    run_with_gradients,
    tiny_config,
    train_in_turn,
    train_tiny,
)

STEPS, BATCH = 4, 24
SETTINGS: dict[str, Any] = FILTERED | {
    "model__num_heads": 4,
    "spectral__method": "full",
    "train__steps": STEPS,
    "train__precision": "fp64",
    "train__global_batch_size": BATCH,
    "train__eval_interval": STEPS,
}
SST = {"spectral__method": "sst"}
WIDE = {"model__hidden_size": 64}  # more entries a matrix than are sampled
CASES: dict[str, dict[str, Any]] = {
    "layers": WIDE | KNN | JOINT,
    "sigma": SST | KNN | JOINT,
    "frod": JOINT
    | {
        "spectral__method": "frod",
        "spectral__sparsity": 0.05,
        # All but fc2, whose short stack has a null space, where any basis is as good as another.
        "spectral__targets": "[q_proj,k_proj,v_proj,out_proj,fc1]",
    },
    "rows": KNN | JOINT | {"filter__nodes": "rows"},
    "heads": KNN | {"filter__nodes": "heads", "filter__norm_matched": True},
    "block_gains": SST | {"filter__nodes": "block_gains"},
}
LINES = {2: tuple(CASES), 4: ("layers", "sigma", "rows")}
"""Ranks that share each matrix, of four: the cases run with them."""


def shared(tensor_parallel: int, world: int) -> dict[str, Any]:
    """The host, and an accumulation of two micro-batches."""
    micro = BATCH // (2 * world // tensor_parallel)
    return {
        "parallel__backend": "fsdp2",
        "parallel__tensor_parallel": tensor_parallel,
        "train__micro_batch_size": micro,
    }


def test_equals_one_process(corpus: Path, tmp_path: Path) -> None:
    """2 x 2 and 4 in one line, clipping and accumulation on, across a swap and renewed graphs: all
    losses, weights and measurements, in double precision."""
    alone = [
        (tiny_config(corpus, tmp_path / name, train__micro_batch_size=12, **(SETTINGS | c)), None)
        for name, c in CASES.items()
    ]
    runs = [
        (tiny_config(corpus, tmp_path / f"{tp} {n}", **(SETTINGS | CASES[n] | shared(tp, 4))), None)
        for tp, names in LINES.items()
        for n in names
    ]
    cases = [name for names in LINES.values() for name in names]
    (expected,) = run_distributed(train_in_turn, 1, alone, timeout_seconds=300)
    ranks = run_distributed(train_in_turn, 4, runs, timeout_seconds=600)
    for index, (config, _) in enumerate(runs):
        reference = expected[list(CASES).index(cases[index])]
        found = distance([rank[index] for rank in ranks], reference)
        where = config.train.run_dir
        assert found.loss < 1e-12, where
        assert found.weights < 1e-9, where
        assert found.steps_equal and found.indices_equal, where
        assert_same_measures(ranks[0][index]["lines"], reference["lines"], where)


def assert_same_measures(found: list[Any], expected: list[Any], where: str) -> None:
    """What was removed, frequencies and drift at every step."""
    compared, different = compare_measures(found, expected, rel=1e-6, abs_=1e-9, energy_rel=1e-6)
    assert compared > STEPS and not different, (where, different[:3])


def traffic(configs: list[Any]) -> list[dict[str, Any]]:
    """Collectives of the filter in a step that is not measured; bytes that it keeps, and plans."""
    from spectral_scale.config.check import check_config
    from spectral_scale.plan.filter_needs import filter_needs
    from spectral_scale.plan.inventory import take_inventory
    from spectral_scale.testing.traffic import TrafficCounter

    found = []
    with one_process_group():
        for config in configs:
            run = run_with_gradients(config)
            with TrafficCounter() as counter:
                run.gradient_filter.apply()
            inventory = take_inventory(config, check_config(config, world_size=2))
            needs = filter_needs(config, inventory, world_size=2)
            kept = run.gradient_filter.nbytes
            found.append({"calls": dict(counter.calls), "kept": kept, "needs": needs})
    return found


def test_traffic(corpus: Path, tmp_path: Path) -> None:
    """Nothing for layers, of dense matrices or of sigma; one all-to-all there and one back for
    rows, which lie on several ranks. `spectral-scale plan` says so, and what is kept."""
    cases = [KNN | JOINT, SST | KNN | JOINT, {"filter__nodes": "rows"}]
    configs = [
        tiny_config(corpus, tmp_path / str(i), **(SETTINGS | case | shared(2, 2)))
        for i, case in enumerate(cases)
    ]
    for rank in run_distributed(traffic, 2, configs, timeout_seconds=200):
        assert [found["calls"] for found in rank] == [{}, {}, {"alltoall_base": 2}]
        assert [found["needs"].exchanged > 0 for found in rank] == [False, False, True]
        graphs = 6 * 3 * 8 * 3**2  # of three nodes, in three matrices; not there yet
        assert [found["needs"].kept - found["kept"] for found in rank[:2]] == [graphs, graphs]


def test_state_moves(corpus: Path, tmp_path: Path) -> None:
    """Stopped between two renewals of the graph: bit for bit where it was, and as if undisturbed
    on one process and back: means, anchors and drift change their order on the way."""
    settings = SETTINGS | WIDE | KNN | JOINT | {"filter__anchor_steps": 0, "train__steps": 6}
    parts = settings | shared(2, 2)

    def config(folder: str, **changes: Any) -> Any:
        return tiny_config(corpus, tmp_path / folder, **(parts | changes))

    runs = [
        (config("straight"), None),
        (config("broken"), 3),
        (config("broken"), None),
        (config("moved"), 3),
    ]
    ranks = run_distributed(train_in_turn, 2, runs, timeout_seconds=300)
    for straight, first, second, _ in ranks:
        assert first["step"] == 3 and second["step"] == 6
        assert first["losses"] | second["losses"] == straight["losses"]
        assert straight["tensors"].keys() == second["tensors"].keys()
        assert all(np.array_equal(second["tensors"][k], v) for k, v in straight["tensors"].items())
    alone = settings | {"train__micro_batch_size": 12}
    there = run_distributed(train_tiny, 1, tiny_config(corpus, tmp_path / "moved", **alone), 2)[0]
    back = run_distributed(train_tiny, 2, config("moved"), timeout_seconds=200)
    assert there["step"] == 5 and back[0]["step"] == 6
    straight = ranks[0][0]
    for step, loss in (there["losses"] | back[0]["losses"]).items():
        assert loss == pytest.approx(straight["losses"][step], abs=1e-12)
    lines = there["lines"] + back[0]["lines"]
    expected = dict(straight["lines"])
    assert_same_measures(lines, [(step, expected[step]) for step, _ in lines], "moved")
    shutil.rmtree(tmp_path / "moved")


# -- twins: each breaks one thing that the filter relies on, and must be noticed ----------------


def row_major_samples(patch: pytest.MonkeyPatch) -> None:
    """Sampled entries are looked for where they would lie in rows."""
    from spectral_scale.parallel.shard_geometry import FlatOrder

    patch.setattr(FlatOrder, "places", lambda order, entries: entries)


def matrices_left_in_blocks(patch: pytest.MonkeyPatch) -> None:
    """The rows of a whole matrix are read from its blocks of columns."""
    from spectral_scale.parallel.shard_geometry import FlatOrder

    patch.setattr(FlatOrder, "to_row_major", lambda order, flat: flat)
    patch.setattr(FlatOrder, "from_row_major", lambda order, flat: flat)


def copies_count(patch: pytest.MonkeyPatch) -> None:
    """What every rank of a line holds is added up."""
    from spectral_scale.optim.filter import gains

    patch.setattr(gains, "is_first_holder", lambda pieces, fqn: True)


TWINS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    row_major_samples: "layers",
    matrices_left_in_blocks: "rows",
    copies_count: "block_gains",
}


def train_twins(runs: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Each configuration, with what is broken in it."""
    results = []
    with one_process_group():
        for config, twin in runs:
            with pytest.MonkeyPatch.context() as patch:
                if twin is not None:
                    twin(patch)
                results.append(train_tiny(config))
    return results


def test_a_broken_twin_shows(corpus: Path, tmp_path: Path) -> None:
    runs = [
        (tiny_config(corpus, tmp_path / str(i), **(SETTINGS | CASES[case] | shared(2, 2))), twin)
        for i, (case, twin) in enumerate(
            pair for twin, case in TWINS.items() for pair in ((case, None), (case, twin))
        )
    ]
    losses = [r["losses"] for r in run_distributed(train_twins, 2, runs, timeout_seconds=300)[0]]
    for right, wrong, twin in zip(losses[::2], losses[1::2], TWINS, strict=True):
        gap = max(abs(right[step] - wrong[step]) for step in right)
        assert gap > 1e-9, twin.__name__
