"""Megatron sums gradients during the backward pass, to the same values as after it."""

from pathlib import Path
from typing import Any

import numpy as np
from run_settings import UNCLIPPED

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble
from spectral_scale.testing.megatron import megatron_in_one_group
from spectral_scale.testing.tiny import tiny_config, train_tiny

STEPS, STOP = 5, 3  # a swap after 4
BUCKET = 20_000
"""Elements; the model has several buckets then."""
SETTINGS: dict[str, Any] = {
    "train__steps": STEPS,
    "train__global_batch_size": 8,
    "train__micro_batch_size": 2,  # two micro-batches a step
    "parallel__backend": "megatron",
    "optimizer__eps": 1e-5,
    "optimizer__spectral_lr": 1e-4,
} | UNCLIPPED


def train(runs: list[tuple[Any, bool, int | None]]) -> list[dict[str, Any]]:
    """Train each (configuration, overlap, step to stop at) on this rank; also how many reductions
    began inside a backward pass, and how many after it."""
    with megatron_in_one_group():
        from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

        from spectral_scale.backends.megatron import backend as module

        found, state = [], {"overlap": True, "inside": 0}
        settings: Any = module.DistributedDataParallelConfig
        start, backward = _ParamAndGradBucketGroup.start_grad_sync, module.MegatronBackend.backward
        began: list[int] = []

        def chosen(**options: Any) -> Any:
            options["overlap_grad_reduce"] &= state["overlap"]
            return settings(**options, bucket_size=BUCKET)

        def counted(group: Any, *given: Any, **options: Any) -> None:
            began.append(state["inside"])
            start(group, *given, **options)

        def marked(self: Any, loss: Any) -> None:
            state["inside"] = 1
            backward(self, loss)
            state["inside"] = 0

        module.DistributedDataParallelConfig = chosen  # type: ignore[assignment,misc]
        _ParamAndGradBucketGroup.start_grad_sync = counted
        module.MegatronBackend.backward = marked  # type: ignore[method-assign]
        for config, overlap, stop in runs:
            began.clear()
            state["overlap"] = overlap
            result = train_tiny(config, stop)
            found.append(result | {"inside": sum(began), "after": len(began) - sum(began)})
        return found


def test_overlapped_sums_are_the_same(corpus: Path, tmp_path: Path) -> None:
    """From the second step on, every bucket is reduced inside the backward pass of the last
    micro-batch; the twin without overlap reduces after it. Whoever steps, the bits are the same,
    also after a stop, where each rank's part of every bucket was saved."""
    cases = [(sharded, overlap) for sharded in (True, False) for overlap in (True, False)]

    def configured(name: str, sharded: bool) -> Any:
        changes = SETTINGS | {"parallel__distributed_optimizer": sharded}
        return tiny_config(corpus, tmp_path / name, **changes)

    runs = [(configured(f"{s}_{o}", s), o, None) for s, o in cases]
    stopped = configured("stopped", True)
    runs += [(stopped, True, STOP), (stopped, True, None)]
    ranks = run_distributed(train, 2, runs, timeout_seconds=400)
    found = {case: [rank[i] for rank in ranks] for i, case in enumerate(cases)}
    for sharded in (True, False):
        overlapped, plain = found[sharded, True], found[sharded, False]
        buckets = overlapped[0]["after"]  # those of the first step, whose order Megatron notes
        assert buckets > 1 and overlapped[0]["inside"] == (STEPS - 1) * buckets
        assert plain[0]["inside"] == 0 and plain[0]["after"] >= STEPS
        assert overlapped[0]["losses"] == plain[0]["losses"]
        assert different(assemble(overlapped), assemble(plain)) == []
    resumed = [rank[-1] for rank in ranks]
    assert resumed[0]["step"] == STEPS and ranks[0][-2]["step"] == STOP
    assert different(assemble(resumed), assemble(found[True, True])) == []


def different(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of tensors that are not equal to the bit."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not np.array_equal(found[name], value)]
