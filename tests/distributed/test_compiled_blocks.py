"""Compiled blocks on two ranks: the losses of plain blocks, and nothing compiled after a swap.

Graphs are captured and differentiated as for real; only the slow code generation is left out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny

SETTINGS: dict[str, Any] = {
    "train__steps": 6,  # a swap after the fourth
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


def train_compiled(config: Any) -> dict[str, Any]:
    """`train_tiny`, and how many graphs there were before each swap and at the end."""
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
    result = train_tiny(config)
    graphs.append(counters["stats"]["unique_graphs"])
    return {"losses": result["losses"], "graphs": graphs}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_plain_blocks(
    backend: str, corpus: Path, tmp_path: Path, train_alone: Callable[..., dict[str, Any]]
) -> None:
    changes = SETTINGS | BACKENDS[backend] | {"train__micro_batch_size": 4}
    config = tiny_config(corpus, tmp_path, model__compile=True, **changes)
    ranks = run_distributed(train_compiled, 2, config, timeout_seconds=600)
    expected = train_alone(SETTINGS | {"train__micro_batch_size": 8})["losses"]
    assert ranks[0]["losses"] == pytest.approx(expected, abs=2e-5)
    for rank in ranks:
        before_the_swap, after = rank["graphs"]
        assert before_the_swap == after >= 1
