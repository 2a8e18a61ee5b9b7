"""Compiled blocks on two ranks: the losses of plain blocks, and nothing compiled after a swap.

Graphs are captured and differentiated as for real; only the slow code generation is left out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import one_process_group, tiny_config, train_tiny

SETTINGS: dict[str, Any] = {
    "train__steps": 5,  # a swap after the fourth
    "train__global_batch_size": 8,
    # Above rounding, which Adam would blow up to full steps.
    "optimizer__eps": 1e-5,
}
DEEPSPEED = {"parallel__backend": "deepspeed"}
BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {},
    "fsdp2": {"parallel__backend": "fsdp2"},
    "hsdp": {"parallel__backend": "fsdp2", "parallel__shard_group": 1},
    "zero1": DEEPSPEED | {"parallel__zero_stage": 1},
    "zero2": DEEPSPEED | {"parallel__zero_stage": 2},
    "zero3": DEEPSPEED | {"parallel__zero_stage": 3},
}
Results = Mapping[str, list[dict[str, Any]]]


def train_compiled(configs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Losses of each run, and how many graphs there were before its swap and at its end."""
    import torch
    from torch._dynamo.utils import counters

    from spectral_scale.methods.sst.swap import Swap

    compile_really, swap_really = torch.compile, Swap.run
    graphs: list[int] = []

    def compile_quickly(function: Any) -> Any:
        return compile_really(function, backend="aot_eager", fullgraph=True)

    def swap(self: Swap, iteration: int) -> Any:
        graphs.append(counters["stats"]["unique_graphs"])
        return swap_really(self, iteration)

    torch.compile, Swap.run = compile_quickly, swap  # type: ignore[assignment,method-assign]
    found = {}
    with one_process_group():
        for name, config in configs.items():
            torch._dynamo.reset()
            counters.clear()
            graphs.clear()
            losses = train_tiny(config)["losses"]
            found[name] = {
                "losses": losses,
                "graphs": [*graphs, counters["stats"]["unique_graphs"]],
            }
    return found


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank found, by backend; all runs in one pair of processes, which start slowly."""
    configs = {
        name: tiny_config(
            corpus,
            tmp_path_factory.mktemp(name),
            model__compile=True,
            train__micro_batch_size=4,
            **SETTINGS,
            **keys,
        )
        for name, keys in BACKENDS.items()
    }
    ranks = run_distributed(train_compiled, 2, configs, timeout_seconds=600)
    return {name: [rank[name] for rank in ranks] for name in configs}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_plain_blocks(
    backend: str, results: Results, train_alone: Callable[..., dict[str, Any]]
) -> None:
    expected = train_alone(SETTINGS | {"train__micro_batch_size": 8})["losses"]
    assert results[backend][0]["losses"] == pytest.approx(expected, abs=2e-5)
    for rank in results[backend]:
        before_the_swap, after = rank["graphs"]
        assert before_the_swap == after >= 1
