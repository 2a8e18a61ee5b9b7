"""What ZeRO sends and keeps under SST, counted, against formulas: nothing dense, nothing twice.

T trained and D frozen elements (bf16), N ranks, a micro-batches a step; trained weights and
gradients in bf16 and fp32. Payloads are bytes of whole messages.
"""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config

WIDTH, RANK, LAYERS, BATCH = 128, 4, 2, 4
BUCKET = 2**16  # elements: 1 % of what the tiny model holds, not ten times all of it
SHAPES = [*[(WIDTH, WIDTH)] * 4, (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS
DENSE = sum(m * n for m, n in SHAPES)
ACTIVE = sum(RANK * (m + n) + RANK for m, n in SHAPES)
BANK = 4 * sum(min(m, n) * (m + n + 1) for m, n in SHAPES)
SMALL = 10 * WIDTH  # ZeRO-3 keeps parameters up to this size whole on every rank
SETTINGS: dict[str, Any] = {
    "model__hidden_size": WIDTH,
    "model__num_layers": LAYERS,
    "spectral__spectral_rank": RANK,
    "spectral__steps_per_iteration": 2,
    "train__micro_batch_size": 1,
    "train__global_batch_size": BATCH,
    "train__precision": "bf16",
    "parallel__backend": "deepspeed",
}


def measure(config: Any, fault: Callable[[Any], Any]) -> dict[str, Any]:
    """Train four steps with two swaps; payloads of the last ones, and bytes that are kept."""
    import torch

    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.tiny import build_from_config
    from spectral_scale.testing.traffic import ProductShapes, TrafficCounter

    create_run_folder(Path(config.train.run_dir))
    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    run = build_from_config(config, detect_rank_info())
    kept = fault(run)
    loop = TrainingLoop(run, NullLog(), None)
    found: dict[str, Any] = {}
    for batch in run.loader.steps(0, 2):  # with a swap, whose proof collects more
        loop._forward_backward(batch)
        run.backend.step(clip_grad_norm=1.0)
        run.controller.after_step()
    for batch in run.loader.steps(2, 4):
        with TrafficCounter() as counter, ProductShapes() as products:
            loop._forward_backward(batch)
        found["gradient"] = dict(counter.payload_bytes)
        if batch.step == 3:
            found["with_gradients"] = live_bytes(before)
        with TrafficCounter() as counter:
            run.backend.step(clip_grad_norm=1.0)
        found["step"] = dict(counter.payload_bytes)
        with TrafficCounter() as counter:
            report = run.controller.after_step()
        found["quiet" if report is None else "swap"] = dict(counter.payload_bytes)
    sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in run.model.named_parameters()}
    trained = {n: sizes[n] for n, p in run.model.named_parameters() if p.requires_grad}
    found |= {
        "products": products.shapes,
        "between_steps": live_bytes(before),
        "bank": run.controller.nbytes(),
        "trained": sum(trained.values()),
        "small": sum(n for n in trained.values() if n <= SMALL),
        "embedding": sizes["model.decoder.embed_tokens.weight"],
        "foreign": foreign_elements(run),
    }
    run.backend.close()
    del kept
    return found


def foreign_elements(run: Any) -> int:
    """Elements of active triplets whose masters are here, and their owner elsewhere."""
    store, rank = run.backend.store(), run.backend.collective.rank
    return sum(
        fragment.numel
        for name, owner in run.controller.owners.items()
        for leaf in ("u", "sigma", "v")
        if owner != rank and (fragment := store.fragments[f"{name}.{leaf}"]) is not None
    )


def live_bytes(before: set[int]) -> int:
    """Bytes of all tensors that have come to life since, each storage once."""
    import torch

    from spectral_scale.metrics.measures import tensor_bytes

    gc.collect()
    live = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before]
    return tensor_bytes(t for t in live if t.device.type != "meta")  # DeepSpeed leaves shapes


def waste(run: Any) -> list[Any]:
    """Every frozen weight is kept twice, and summed over ranks with the gradients."""
    import torch.distributed as dist

    copies = [p.detach().clone() for p in run.model.parameters() if not p.requires_grad]
    backward = run.backend.backward

    def faulty(loss: Any) -> None:
        backward(loss)
        for weight in copies:
            dist.all_reduce(weight.float())

    run.backend.backward = faulty
    return copies


def nothing(run: Any) -> None:
    """No fault."""


Measure = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def measured(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """What each rank counted, for each case once."""
    known: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def of(stage: int, world: int, fault: Callable[[Any], Any] = nothing) -> Any:
        key = (stage, world, fault)
        if key not in known:
            folder = tmp_path_factory.mktemp("zero")
            zero = {"stage": stage, "reduce_bucket_size": BUCKET}
            if stage == 3:  # free every gathered weight at once, as a model that fills the GPU
                zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
            path = folder / "ds.json"
            path.write_text(json.dumps({"zero_optimization": zero}))
            settings = SETTINGS | {"parallel__deepspeed_config": str(path)}
            if stage == 0:
                settings |= {"train__precision": "fp32"}
            config = tiny_config(corpus, folder / "run", **settings)
            known[key] = run_distributed(measure, world, config, fault, timeout_seconds=120)
        return known[key]

    return of


def reduced(found: dict[str, Any]) -> int:
    """Payload of the step's reduction of gradients."""
    gradient = found["gradient"]
    return int(gradient.get("allreduce", 0) + gradient.get("reduce_scatter_base", 0))


TRAFFIC = [(0, 2), (1, 2), (2, 2), (2, 4), (3, 2), (3, 4)]


@pytest.mark.parametrize(("stage", "world"), TRAFFIC)
def test_gradients(stage: int, world: int, measured: Measure) -> None:
    """Every trained gradient in fp32, once a step, from stage 2 on once a micro-batch: DeepSpeed
    then keeps no whole gradients to add to. Frozen weights never; nothing else but ZeRO-3's
    weights."""
    found = measured(stage, world)[0]
    times = BATCH // world if stage >= 2 else 1
    assert reduced(found) == pytest.approx(times * 4 * found["trained"], rel=0.02)
    converted = reduced(found) / times - 4 * (found["trained"] - ACTIVE)
    assert converted < 0.06 * 4 * DENSE  # r / d = 1 / 32
    operation = "reduce_scatter_base" if stage == 3 else "allreduce"
    others = {"allgather_base"} if stage == 3 else set()
    assert found["gradient"].keys() == {operation} | others


def test_a_reduced_residual_would_show(measured: Measure) -> None:
    found = measured(2, 2, waste)[0]
    converted = reduced(found) / (BATCH // 2) - 4 * (found["trained"] - ACTIVE)
    assert converted == pytest.approx(4 * (DENSE + ACTIVE), rel=0.02)


@pytest.mark.parametrize(("stage", "world"), TRAFFIC)
def test_weights(stage: int, world: int, measured: Measure) -> None:
    """Stages 1 and 2 send updated weights once a step in bf16; stage 3 gathers all weights, frozen
    ones too, for each forward and backward pass (the tied embedding for both of its uses)."""
    found = measured(stage, world)[0]
    if stage == 3:
        gathered = 2 * (DENSE + found["trained"] - found["small"] + found["embedding"])
        passes = 2 * BATCH // world
        assert found["gradient"]["allgather_base"] == pytest.approx(passes * gathered, rel=0.02)
        assert found["step"].pop("allgather_base") == 2 * found["small"]
    elif stage:
        assert found["step"].pop("allgather_base") == pytest.approx(2 * found["trained"], rel=0.02)
    norms = 4 * 2 * RANK * len(SHAPES)  # of columns; clipping and DeepSpeed add a few numbers
    assert sum(found["step"].values()) <= norms + 64
    assert not found["quiet"]  # after a step that ends no iteration


@pytest.mark.parametrize(("stage", "world"), TRAFFIC)
def test_swap(stage: int, world: int, measured: Measure) -> None:
    """Each rank sends its masters of active triplets to their owners, (N - 1) / N of them on
    average; the owners send new ones in fp32 and rebuilt frozen weights in bf16, whole or only the
    pieces that a rank holds."""
    ranks = measured(stage, world)
    sent = sum(found["swap"].get("send", 0) for found in ranks)
    collected, delivered = 4 * sum(f["foreign"] for f in ranks), 2 * DENSE + 4 * ACTIVE
    assert collected <= 4 * ACTIVE
    swap = ranks[0]["swap"]
    elsewhere = (world - 1) / world  # of a tensor, evenly cut
    if stage == 0:  # fp32, frozen weights too; owners hold what they collect
        assert swap["broadcast"] == 4 * (DENSE + ACTIVE) and not sent
    elif stage == 3:
        assert collected == pytest.approx(elsewhere * 4 * ACTIVE, rel=0.02)
        assert sent == pytest.approx(collected + elsewhere * delivered, rel=0.02)
        assert swap["allgather_base"] <= 2 * (ACTIVE + found_small(ranks))
    else:
        assert swap["broadcast"] == delivered
        assert sent == collected
    rest = {"broadcast", "send", "recv", "allgather_base"}
    assert sum(n for k, n in swap.items() if k not in rest) < 10_000  # spectra, counts, flags


def found_small(ranks: list[dict[str, Any]]) -> int:
    """Elements that ZeRO-3 keeps whole; written to, they are gathered again."""
    return int(ranks[0]["small"])


def kept_elements(stage: int, world: int, found: dict[str, Any], *, gradients: bool) -> float:
    """Bytes of weights, gradients and states by the formulas."""
    t = found["trained"]
    if stage == 0:  # fp32: everything everywhere; gradients live from backward to step
        return 4 * (DENSE + t) + 8 * t + (4 * t if gradients else 0)
    if stage == 1:  # BF16_Optimizer: fp32 gradients whole and always there, bf16 ones until step
        return 2 * (DENSE + t) + 12 * t / world + 4 * t + (2 * t if gradients else 0)
    if stage == 2:
        return 2 * (DENSE + t) + 12 * t / world + (4 * t / world if gradients else 0)
    always = 4 * BUCKET + 2 * found["small"]
    return (2 * (DENSE + t) + 12 * t + 4 * t) / world + always


MEMORY = [
    (0, 1),
    (0, 2),
    (0, 4),
    (1, 1),
    (1, 2),
    (1, 4),
    (2, 1),
    (2, 2),
    (2, 4),
    (3, 1),
    (3, 2),
    (3, 4),
]


@pytest.mark.parametrize(("stage", "world"), MEMORY)
def test_memory(stage: int, world: int, measured: Measure) -> None:
    """Live bytes of every rank are weights, gradients, states and its own bank; no more than 3 %
    differ, and a frozen weight kept twice would be more."""
    ranks = measured(stage, world)
    for found in ranks:
        for when, gradients in (("with_gradients", True), ("between_steps", False)):
            expected = kept_elements(stage, world, found, gradients=gradients) + found["bank"]
            assert found[when] == pytest.approx(expected, rel=0.03), when
    assert sum(found["bank"] for found in ranks) == BANK


def test_a_second_residual_would_show(measured: Measure) -> None:
    found = measured(2, 2, waste)[0]
    expected = kept_elements(2, 2, found, gradients=False) + found["bank"]
    assert found["between_steps"] == pytest.approx(expected + 2 * DENSE, rel=0.03)
    assert found["between_steps"] != pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2)])
def test_no_dense_gradient(stage: int, world: int, measured: Measure) -> None:
    """No product has the shape of a converted matrix; those of the factors' gradients are there."""
    shapes = measured(stage, world)[0]["products"]
    dense = set(SHAPES) - {(512, WIDTH)}  # which is the embedding's shape, too
    assert not shapes & dense
    assert (WIDTH, RANK) in shapes
