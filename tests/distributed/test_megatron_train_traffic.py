"""What a step on megatron-core sends over which group, counted, against formulas."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config
from spectral_scale.testing.traffic import TrafficCounter

WIDTH, RANK, LAYERS, SEQUENCE, MICRO = 64, 4, 2, 32, 2
TOKENS, FP32 = SEQUENCE * MICRO, 4
MATRICES = 6 * LAYERS  # q, k, v, out, fc1, fc2
LINEARS = 4 * LAYERS  # qkv, out, fc1, fc2
SETTINGS: dict[str, Any] = {
    "model__hidden_size": WIDTH,
    "model__num_layers": LAYERS,
    "model__sequence_length": SEQUENCE,
    "spectral__spectral_rank": RANK,
    "train__micro_batch_size": MICRO,
    "train__global_batch_size": 2 * MICRO,
    "parallel__backend": "megatron",
    "parallel__tensor_parallel": 2,
}


GROUPS = {(0, 1): "tensor", (0, 2): "data", (0, 1, 2, 3): "world"}
"""Those of rank 0."""


def by_group(counter: TrafficCounter) -> dict[tuple[str, str], int]:
    return {(GROUPS.get(ranks, "?"), name): n for (ranks, name), n in counter.by_group.items()}


def traffic(configs: list[Any]) -> list[dict[str, Any]]:
    """Of each run, bytes by group and operation of the parts of one step."""
    from spectral_scale.models.loss import token_loss_sum
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.testing.megatron import megatron_in_one_group
    from spectral_scale.testing.tiny import build_from_config

    found = []
    with megatron_in_one_group():
        for config in configs:
            run = build_from_config(config, detect_rank_info())
            batch = next(iter(run.loader.steps(0, 1))).micro_batches[0]
            parts: dict[str, Any] = {"trained": run.model.parameters()}
            parts["trained"] = sum(p.numel() for p in parts["trained"] if p.requires_grad)
            micro_batch = ExitStack()
            micro_batch.enter_context(run.backend.accumulate(last=True))
            with TrafficCounter() as counter:
                loss = token_loss_sum(run.forward, *batch)
            parts["forward"] = by_group(counter)
            with TrafficCounter() as counter:
                run.backend.backward(loss)
            parts["backward"] = by_group(counter)
            with TrafficCounter() as counter:
                micro_batch.close()  # sums gradients
                run.backend.step(clip_grad_norm=1.0)
            parts["step"] = by_group(counter)
            with TrafficCounter() as counter:
                run.controller.after_step()
            parts["after"] = by_group(counter)
            found.append(parts)
            run.backend.close()
    return found


@pytest.fixture(scope="module")
def counted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("traffic")
    changes: dict[str, dict[str, Any]] = {
        "bottleneck": {},
        "per_step": {"parallel__factor_gradients": "per_step"},
        "sequence": {"parallel__sequence_parallel": True},
    }
    configs = [tiny_config(corpus, folder / n, **(SETTINGS | c)) for n, c in changes.items()]
    results = run_distributed(traffic, 4, configs, timeout_seconds=120)[0]
    return dict(zip(changes, results, strict=True))


ACTIVATION = FP32 * TOKENS * WIDTH
BOTTLENECK = FP32 * TOKENS * RANK
LOSS = 3 * FP32 * TOKENS  # largest logit, logit of the label, sum of exponentials


def test_tensor_parallel_traffic(counted: dict[str, dict[str, Any]]) -> None:
    """Activations as in dense layers; tokens x r for each matrix on top, in backward only."""
    found = counted["bottleneck"]
    # Forward: embedding, and the outputs of the row-parallel half of the linears.
    assert found["forward"] == {("tensor", "allreduce"): (1 + LINEARS // 2) * ACTIVATION + LOSS}
    # Backward: inputs of the column-parallel half and of the output layer.
    own = (1 + LINEARS // 2) * ACTIVATION
    assert found["backward"] == {("tensor", "allreduce"): own + MATRICES * BOTTLENECK}
    # A linear's own traffic is one activation; a matrix adds r / n of that.
    assert BOTTLENECK / ACTIVATION == RANK / WIDTH


def test_per_step_sends_factors_once(counted: dict[str, dict[str, Any]]) -> None:
    found, other = counted["per_step"], counted["bottleneck"]
    own = (1 + LINEARS // 2) * ACTIVATION
    assert found["backward"] == {("tensor", "allreduce"): own}
    factors = FP32 * (MATRICES * WIDTH * RANK + MATRICES * RANK)  # v or u of n rows, and sigma
    step = found["step"]["tensor", "allreduce"] - other["step"].get(("tensor", "allreduce"), 0)
    assert step == factors


def test_sequence_parallel_traffic(counted: dict[str, dict[str, Any]]) -> None:
    """Gathers and scatters in the place of sums; the bottleneck stays as it is."""
    forward, backward = counted["sequence"]["forward"], counted["sequence"]["backward"]
    gathers = LINEARS // 2 * ACTIVATION
    assert forward["tensor", "reduce_scatter_base"] == gathers
    assert forward["tensor", "allgather_base"] == gathers + ACTIVATION  # the output layer's input
    assert backward["tensor", "allreduce"] == MATRICES * BOTTLENECK
    assert backward["tensor", "reduce_scatter_base"] == gathers + ACTIVATION


def test_data_parallel_traffic(counted: dict[str, dict[str, Any]]) -> None:
    """Each trained element of this rank once as a gradient and once as a weight, if not frozen."""
    found = counted["bottleneck"]
    trained = FP32 * found["trained"]
    data = {operation: n for (group, operation), n in found["step"].items() if group == "data"}
    scattered, gathered = "reduce_scatter_tensor_coalesced", "allgather_into_tensor_coalesced"
    assert set(data) == {scattered, gathered}
    assert data[scattered] == pytest.approx(trained, rel=0.02)  # padded buckets
    assert data[gathered] == pytest.approx(trained, rel=0.02)
    norms = found["step"]["world", "allreduce"]
    assert norms == 8 * 3  # dense, directions, values: float64
    # Column norms of the factors that are cut, one of each matrix.
    assert found["after"] == {("tensor", "allreduce"): FP32 * MATRICES * RANK}
