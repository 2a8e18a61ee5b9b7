"""What FSDP2 sends and keeps, counted, against formulas: nothing dense, nothing twice."""

import gc
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config

WIDTH, RANK, LAYERS = 128, 4, 2
SETTINGS: dict[str, Any] = {
    "model__hidden_size": WIDTH,
    "model__num_layers": LAYERS,
    "spectral__spectral_rank": RANK,
    "train__micro_batch_size": 1,
    "train__global_batch_size": 4,
    "train__precision": "bf16",
    "parallel__backend": "fsdp2",
}
SHAPES = [*[(WIDTH, WIDTH)] * 4, (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS
DENSE = sum(m * n for m, n in SHAPES)
ACTIVE = sum(RANK * (m + n) + RANK for m, n in SHAPES)


def traffic(config: Any) -> dict[str, dict[str, int]]:
    """Payload bytes by collective: of a step without and of one with a swap; trained elements."""
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.testing.tiny import build_from_config
    from spectral_scale.testing.traffic import TrafficCounter

    run = build_from_config(config, detect_rank_info())
    loop = TrainingLoop(run, NullLog(), None)
    found = {"trained": {"": sum(p.numel() for p in run.model.parameters() if p.requires_grad)}}
    for batch in run.loader.steps(0, 4):
        with TrafficCounter() as counter:
            loop._forward_backward(batch)
        found["gradient"] = dict(counter.payload_bytes)
        with TrafficCounter() as counter:
            run.backend.step(clip_grad_norm=1.0)
        found["clip"] = dict(counter.payload_bytes)
        with TrafficCounter() as counter:
            report = run.controller.after_step()
        found["step" if report is None else "swap"] = dict(counter.payload_bytes)
    run.backend.close()
    return found


@pytest.mark.parametrize(
    ("world", "residual"), [(2, "sharded"), (4, "sharded"), (2, "replicated")], ids=str
)
def test_traffic(world: int, residual: str, corpus: Path, tmp_path: Path) -> None:
    """Per optimizer step of a = 4 / world micro-batches, in bytes of whole messages."""
    config = tiny_config(corpus, tmp_path, parallel__residual=residual, **SETTINGS)
    found = run_distributed(traffic, world, config)[0]
    frozen = 2 * DENSE if residual == "sharded" else 0
    trained = found["trained"][""]
    outside = trained - ACTIVE  # embeddings, norms, biases
    gathered = found["gradient"].pop("allgather_base")
    reduced = found["gradient"].pop("reduce_scatter_base")
    assert not found["gradient"]  # nothing else is sent

    # Every trained gradient once a step, fp32; the frozen residual never.
    assert reduced == pytest.approx(4 * trained, rel=0.02)
    converted = reduced - 4 * outside
    assert converted < 0.06 * 4 * DENSE

    # Blocks twice a micro-batch, the root (embeddings, last norm) once: fp32, the residual bf16.
    root = 4 * _root_elements(trained)
    blocks = 4 * trained - root + frozen
    assert gathered == pytest.approx(4 // world * (2 * blocks + root), rel=0.02)

    # Norms of columns and of three kinds of gradient: next to nothing.
    assert sum(found["step"].values()) == 4 * RANK * 2 * len(SHAPES)
    assert sum(found["clip"].values()) == 4 * 3

    # A swap sends new factors (fp32) and the residual (bf16) from the owners, nothing more.
    assert found["swap"]["scatter"] == pytest.approx(frozen + 4 * ACTIVE, rel=0.02)
    if residual == "replicated":
        assert found["swap"]["broadcast"] == pytest.approx(2 * DENSE, rel=0.02)


def _root_elements(trained: int) -> int:
    """Embeddings, positions and the last norm: what is left without the blocks."""
    biases = 9 * WIDTH * LAYERS
    norms = 4 * WIDTH * LAYERS
    return trained - ACTIVE - biases - norms


def products(config: Any) -> set[tuple[int, ...]]:
    """Shapes of all matrix products of a forward and backward pass."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.testing.tiny import build_from_config

    shapes: set[tuple[int, ...]] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if "mm" in str(func) and isinstance(result, torch.Tensor):
                shapes.add(tuple(result.shape))
            return result

    run = build_from_config(config, detect_rank_info())
    loop = TrainingLoop(run, NullLog(), None)
    with Products():
        loop._forward_backward(next(iter(run.loader.steps(0, 1))))
    run.backend.close()
    return shapes


@pytest.mark.parametrize("method", ["sst", "full"])
def test_no_dense_gradient(method: str, corpus: Path, tmp_path: Path) -> None:
    """No product has the shape of a converted matrix; in dense training each is computed."""
    config = tiny_config(corpus, tmp_path, spectral__method=method, **SETTINGS)
    shapes = run_distributed(products, 1, config)[0]
    dense = set(SHAPES) - {(512, WIDTH)}  # which is the embedding's shape, too
    assert bool(shapes & dense) is (method == "full")
    assert ((WIDTH, RANK) in shapes) is (method == "sst")


def memory(config: Any) -> dict[str, int]:
    """Bytes of every live tensor of this rank after a swap, and of what they should be."""
    import torch

    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.measures import tensor_bytes
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.testing.tiny import build_from_config

    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    run = build_from_config(config, detect_rank_info())
    loop = TrainingLoop(run, NullLog(), None)
    for batch in run.loader.steps(0, 4):
        loop._one_step(batch)
    del batch
    gc.collect()
    live = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before]
    found = {
        "live": tensor_bytes(live),
        "trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "bank": run.controller.nbytes(),
        "gradients": sum(p.grad is not None for p in run.model.parameters()),
    }
    run.backend.close()
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_memory(world: int, corpus: Path, tmp_path: Path) -> None:
    """12 bytes a trained element and 2 a frozen one, over N ranks, and the rank's own bank."""
    ranks = run_distributed(memory, world, tiny_config(corpus, tmp_path, **SETTINGS))
    for found in ranks:
        assert found["gradients"] == 0
        expected = (12 * found["trained"] + 2 * DENSE) / world + found["bank"]
        assert found["live"] == pytest.approx(expected, rel=0.03)
    bank = 4 * sum(min(m, n) * (m + n + 1) for m, n in SHAPES)
    assert sum(found["bank"] for found in ranks) == pytest.approx(bank, rel=0.001)
