"""The spectral filter on megatron-core against one process: sigma over layers, sizes of blocks.

Sigma is whole on every tensor-parallel rank; the DistributedOptimizer steps a range of it on each
data-parallel one, another in every layer.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import PLAIN_ADAM

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble, distance
from spectral_scale.testing.filters import JOINT, KNN, compare_measures
from spectral_scale.testing.filters import SETTINGS as FILTERED
from spectral_scale.testing.megatron import train_in_turn_on_cpu
from spectral_scale.testing.tiny import run_with_gradients, tiny_config, train_in_turn, train_tiny

STEPS, BATCH, STOP = 4, 16, 3
SETTINGS: dict[str, Any] = FILTERED | {
    # No positions and a large rank, so that the DistributedOptimizer cuts between layers.
    "model__name": "llama-60m",
    "spectral__spectral_rank": 20,
    "model__num_heads": 4,
    "model__ffn_size": 96,
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "train__eval_interval": STEPS,
}
CASES: dict[str, dict[str, Any]] = {
    "layers": KNN | JOINT | {"filter__anchor_steps": 0},
    "block_gains": {"filter__nodes": "block_gains"},
}
LAYOUTS: list[tuple[int, int, dict[str, Any]]] = [
    (1, 2, {}),
    (2, 1, {"parallel__sequence_parallel": True}),
    (2, 2, {}),
    (2, 2, PLAIN_ADAM),
]
"""Tensor-parallel ranks, data-parallel ranks, and what else is set."""


def settings(tensor: int, data: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Of a layout, with an accumulation of two micro-batches."""
    found = {
        "parallel__backend": "megatron",
        "parallel__tensor_parallel": tensor,
        "train__micro_batch_size": BATCH // data // 2,
    }
    return SETTINGS | found | changes


def test_equals_one_process(corpus: Path, tmp_path: Path) -> None:
    """Losses, weights, triplets, graphs and what was measured, across a swap and a new graph."""
    alone = [
        (tiny_config(corpus, tmp_path / n, train__micro_batch_size=8, **(SETTINGS | c)), None)
        for n, c in CASES.items()
    ]
    expected = run_distributed(train_in_turn, 1, alone, timeout_seconds=200)[0]
    for world in (2, 4):
        layouts = [x for x in LAYOUTS if x[0] * x[1] == world]
        runs = [
            (tiny_config(corpus, tmp_path / f"{world}{i}{n}", **(settings(*x) | case)), None)
            for i, x in enumerate(layouts)
            for n, case in CASES.items()
        ]
        ranks = run_distributed(train_in_turn_on_cpu, world, runs, timeout_seconds=300)
        for index, (config, _) in enumerate(runs):
            found = [rank[index] for rank in ranks]
            reference = expected[index % len(CASES)]
            gap, where = distance(found, reference), config.train.run_dir
            assert gap.loss < 1e-5, where
            assert gap.weights < 1e-4, where
            assert gap.steps_equal and gap.indices_equal, where
            assert_same_measures(found[0]["lines"], reference["lines"], where)
            assert_same_state(found, reference, where)


def assert_same_measures(found: list[Any], expected: list[Any], where: str) -> None:
    """What was removed, frequencies, drift and the joint loss, at every step."""
    compared, different = compare_measures(found, expected, rel=5e-3, abs_=1e-5, energy_rel=5e-3)
    assert compared > STEPS and not different, (where, different[:3])


def assert_same_state(ranks: list[Any], alone: dict[str, Any], where: str) -> None:
    """Anchors, means, graphs and starting values."""
    found, expected = assemble(ranks), assemble([alone])
    names = {key for key in expected if key.startswith("filter/")}
    assert names == {key for key in found if key.startswith("filter/")}
    for name in names:
        assert np.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4), (where, name)


def test_resume_is_bit_exact(corpus: Path, tmp_path: Path) -> None:
    """Stopped between a swap and the end, with graph, means and anchors."""
    case = settings(2, 2, {}) | CASES["layers"]

    def config(folder: str) -> Any:
        return tiny_config(corpus, tmp_path / folder, **case)

    runs = [(config("straight"), None), (config("broken"), STOP), (config("broken"), None)]
    for straight, first, second in run_distributed(
        train_in_turn_on_cpu, 4, runs, timeout_seconds=200
    ):
        assert first["step"] == STOP and second["step"] == STEPS
        assert first["losses"] | second["losses"] == straight["losses"]
        tensors = straight["tensors"]
        assert tensors.keys() == second["tensors"].keys()
        assert all(np.array_equal(second["tensors"][k], v) for k, v in tensors.items())


def traffic_and_twins(configs: list[Any], broken: list[Any]) -> tuple[list[Any], list[Any]]:
    """Collectives of the filter in a step that is not measured; results of the broken runs."""
    from spectral_scale.optim.filter import gains
    from spectral_scale.parallel.exchange import Exchange
    from spectral_scale.testing.megatron import megatron_in_one_group
    from spectral_scale.testing.traffic import TrafficCounter

    counts, results = [], []
    with megatron_in_one_group(), pytest.MonkeyPatch.context() as patch:
        for config in configs:
            run = run_with_gradients(config)
            with TrafficCounter() as counter:
                run.gradient_filter.apply()
            counts.append(dict(counter.calls))
            run.backend.close()
        patch.setattr(Exchange, "forward", _mixed_up(Exchange.forward))
        patch.setattr(gains, "is_first_holder", lambda pieces, fqn: True)
        results = [train_tiny(config) for config in broken]
    return counts, results


def _mixed_up(forward: Any) -> Any:
    """The first two layers arrive under each other's names."""

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        first, second, *rest = forward(*arguments, **keywords)
        return [second, first, *rest]

    return wrong


def test_traffic_and_broken_twins(corpus: Path, tmp_path: Path) -> None:
    """Nothing is sent where data-parallel copies step the same; else one all-to-all there and one
    back. Layers that change places on the way are noticed, and copies that are added up."""
    plain = {"filter__graph": "path"}
    configs = [
        tiny_config(corpus, tmp_path / f"{i}", **(settings(2, 2, changes) | plain))
        for i, changes in enumerate(({}, PLAIN_ADAM))
    ]
    cases = [plain, CASES["block_gains"]]
    broken = [
        tiny_config(corpus, tmp_path / f"broken {i}", **(settings(2, 2, {}) | case))
        for i, case in enumerate(cases)
    ]
    alone = [
        (tiny_config(corpus, tmp_path / f"a{i}", train__micro_batch_size=8, **(SETTINGS | c)), None)
        for i, c in enumerate(cases)
    ]
    expected = run_distributed(train_in_turn, 1, alone, timeout_seconds=200)[0]
    ranks = run_distributed(traffic_and_twins, 4, configs, broken, timeout_seconds=200)
    for counts, _ in ranks:
        assert counts == [{"alltoall_base": 2}, {}]
    for found, reference in zip(ranks[0][1], expected, strict=True):
        with pytest.raises(AssertionError, match="filter/"):
            assert_same_measures(found["lines"], reference["lines"], "broken")
