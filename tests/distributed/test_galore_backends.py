"""GaLore on every host that cuts or flattens matrices, against one process."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import DEEPSPEED, DOUBLE, OFFLOADED

from spectral_scale.config.capability import projection_group
from spectral_scale.config.resolve import resolve
from spectral_scale.plan.build import plan_run
from spectral_scale.testing.deepspeed import allow_fp16
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble, distance
from spectral_scale.testing.tiny import (
    one_process_group,
    run_with_gradients,
    tiny_config,
    train_in_turn,
    train_tiny,
)

STEPS, STOP, BATCH = 6, 3, 24  # projectors are renewed in steps 1 and 5
MATRICES = 12
SETTINGS: dict[str, Any] = {
    "spectral__method": "galore",
    "train__steps": STEPS,
    "train__global_batch_size": BATCH,
    "train__eval_interval": 100,
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full steps
    "optimizer__weight_decay": 0.1,
    "optimizer__clip_grad_norm": 0.1,  # below the norms of both kinds
}
FSDP2 = {"parallel__backend": "fsdp2"}
HOSTS: dict[str, dict[str, Any]] = {
    "torch": {},
    "fsdp2": FSDP2,
    "hsdp": FSDP2 | {"parallel__shard_group": 2},
    "copies": FSDP2 | {"parallel__shard_group": 1},
    **{f"zero{stage}": DEEPSPEED | {"parallel__zero_stage": stage} for stage in range(4)},
    "zero2+offload": DEEPSPEED | {"parallel__zero_stage": 2} | OFFLOADED,
    "zero3+offload": DEEPSPEED | {"parallel__zero_stage": 3} | OFFLOADED,
}
IN_PARTS = {"zero_optimization": {"stage": 3, "sub_group_size": 3000}}
"""ZeRO-3 steps a few matrices at a time."""
OVERFLOWING = {"fp16": {"enabled": "auto", "initial_scale_power": 21, "hysteresis": 1}}


def config_of(
    corpus: Path, folder: Path, host: str, world: int, accumulation: int = 1, **changes: Any
) -> Any:
    micro = {"train__micro_batch_size": BATCH // (world * accumulation)}
    return tiny_config(corpus, folder / host, **(SETTINGS | micro | HOSTS[host] | changes))


def deepspeed_file(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return {"parallel__deepspeed_config": str(path)}


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process' results in each precision."""
    folder = tmp_path_factory.mktemp("alone")
    runs = [
        (config_of(corpus, folder / p, "torch", 1, train__precision=p), None)
        for p in ("fp64", "fp32", "bf16")
    ]
    (results,) = run_distributed(train_in_turn, 1, runs)
    return {
        config.train.precision: result for (config, _), result in zip(runs, results, strict=True)
    }


FSDP2_CASES = {3: [("fsdp2", 4), ("copies", 1)], 4: [("hsdp", 4), ("fsdp2", 1)]}


@pytest.mark.parametrize("world", FSDP2_CASES)
def test_fsdp2_equals_one_process(
    world: int, corpus: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    """In double precision every tensor is the same, projectors and moments included."""
    cases = FSDP2_CASES[world]
    runs = [(config_of(corpus, tmp_path, host, world, a, **DOUBLE), None) for host, a in cases]
    ranks = run_distributed(train_in_turn, world, runs, timeout_seconds=120)
    for index, case in enumerate(cases):
        results = [rank[index] for rank in ranks]
        found = distance(results, alone["fp64"])
        assert max(found.loss, found.weights, found.factors, found.moments) < 1e-9, case
        assert found.steps_equal, case
        assert_projectors(results, alone["fp64"], case)
        assert_lines(results[0], alone["fp64"])


def assert_projectors(results: list[dict[str, Any]], expected: dict[str, Any], case: Any) -> None:
    tensors, found = expected["tensors"], assemble(results)
    names = [name for name in tensors if name.endswith("/projector")]
    assert len(names) == MATRICES
    for name in names:
        np.testing.assert_allclose(found[name], tensors[name], atol=1e-9, err_msg=f"{case} {name}")


def assert_lines(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What the logs say of gradients and projections."""
    reports = [step for step, line in found["lines"] if "galore/projections" in line]
    assert reports == [1, 5]
    for (_, line), (_, reference) in zip(found["lines"], expected["lines"], strict=True):
        for key in (k for k in reference if k.startswith(("galore/", "train/grad_norm"))):
            assert line[key] == pytest.approx(reference[key], rel=1e-3), key


ZERO_CASES = {
    2: [("zero2", 1), ("zero3", 1)],  # the latter in parts
    3: [(name, 4) for name in HOSTS if name.startswith("zero")],
}


@pytest.mark.parametrize("world", ZERO_CASES)
def test_zero_equals_one_process(
    world: int, corpus: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    """Masters are fp32: everything but moments is equal within rounding."""
    parts = deepspeed_file(tmp_path, IN_PARTS)
    runs = [
        (
            config_of(
                corpus, tmp_path, host, world, a, **(parts if (host, a) == ("zero3", 1) else {})
            ),
            None,
        )
        for host, a in ZERO_CASES[world]
    ]
    ranks = run_distributed(train_in_turn, world, runs, timeout_seconds=200)
    for index, case in enumerate(ZERO_CASES[world]):
        results = [rank[index] for rank in ranks]
        found = distance(results, alone["fp32"])
        assert found.loss < 1e-5 and found.weights < 1e-5, (case, found)
        assert found.steps_equal, case
        assert_lines(results[0], alone["fp32"])


def train_in_halves(runs: list[Any]) -> list[dict[str, Any]]:
    allow_fp16()
    return train_in_turn(runs)


def test_half_precision(corpus: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    """Near the torch backend's bf16; a step that overflows in fp16 counts for no projector."""
    halves = [("zero1", "bf16"), ("zero3+offload", "bf16"), ("zero2", "fp16")]
    scale = deepspeed_file(tmp_path, OVERFLOWING)
    runs = [
        (
            config_of(
                corpus, tmp_path, host, 2, **(scale if p == "fp16" else {}), train__precision=p
            ),
            None,
        )
        for host, p in halves
    ]
    ranks = run_distributed(train_in_halves, 2, runs, timeout_seconds=200)
    reference = alone["bf16"]["losses"]
    for index, (host, precision) in enumerate(halves):
        result = ranks[0][index]
        if precision == "bf16":
            assert max(abs(result["losses"][s] - reference[s]) for s in reference) < 5e-3, host
            continue
        lines = [line for _, line in result["lines"] if "train/loss" in line]
        applied = [line for line in lines if "train/grad_norm" in line]
        assert 0 < lines[-1]["train/skipped_steps"] == STEPS - len(applied)
        assert ["galore/projections" in line for line in lines].index(True) > 0
        renewed = [i for i, line in enumerate(applied) if "galore/projections" in line]
        assert renewed == list(range(0, len(applied), 4))
        steps = {float(t) for n, t in result["tensors"].items() if n.endswith("/step")}
        assert steps == {float(len(applied))}


# -- state -----------------------------------------------------------------------------------------


def test_resume_is_bit_exact_and_state_moves_between_backends(corpus: Path, tmp_path: Path) -> None:
    """Stopped between two renewals. Hosts load what others saved bit for bit, and go on."""
    runs: list[Any] = []
    for host in ("zero2", "fsdp2"):
        runs.append((config_of(corpus, tmp_path / "straight", host, 2), None))
        broken = config_of(corpus, tmp_path / "broken", host, 2)
        runs += [(broken, STOP), (broken, None)]
    folder, chain = tmp_path / "moved", ("zero2", "fsdp2", "zero3", "torch", "zero0")
    moved = {"train__run_dir": str(folder)}
    for step, host in enumerate(chain, start=1):
        for steps in [step] if step == 1 else [step - 1, step]:  # takes no step at first
            runs.append((config_of(corpus, tmp_path, host, 2, **moved, train__steps=steps), None))
    ranks = run_distributed(train_in_turn, 2, runs, timeout_seconds=300)
    for rank in ranks:
        for straight, first, second in (rank[0:3], rank[3:6]):
            assert first["step"] == STOP and second["step"] == STEPS
            assert first["losses"] | second["losses"] == straight["losses"]
            assert_same(second["tensors"], straight["tensors"])
    states = [assemble([rank[i] for rank in ranks]) for i in range(6, len(runs))]
    for saved, loaded in zip(states[0:-1:2], states[1::2], strict=True):
        assert_same(loaded, saved)
    elsewhere = config_of(corpus, tmp_path, "zero2", 3, **moved, train__steps=len(chain))
    assert_same(assemble(run_distributed(train_tiny, 3, elsewhere)), states[-1])


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert not [k for k, v in expected.items() if not np.array_equal(found[k], v)]


# -- twins: each breaks one thing, and must be noticed ----------------------------------------


def nothing_arrives(patch: pytest.MonkeyPatch) -> None:
    """Owners see their own piece of a gradient, and weights an update of their own piece."""
    from spectral_scale.parallel.exchange import Exchange

    patch.setattr(Exchange, "_place", lambda *_: None)


def updates_are_lost(patch: pytest.MonkeyPatch) -> None:
    from spectral_scale.parallel.exchange import Exchange

    plain = Exchange.backward
    patch.setattr(Exchange, "backward", lambda *a, **k: [t * 0 for t in plain(*a, **k)])


def a_matrix_is_left_out(patch: pytest.MonkeyPatch) -> None:
    import torch

    from spectral_scale.methods.galore.sharded_optimizer import ShardedGaLoreAdamW

    plain = ShardedGaLoreAdamW._update

    def update(optimizer: Any, fqn: str, gradient: Any, *rest: Any) -> Any:
        if "layers.0.fc" in fqn:
            return torch.zeros_like(gradient)
        return plain(optimizer, fqn, gradient, *rest)

    patch.setattr(ShardedGaLoreAdamW, "_update", update)


def a_gradient_is_not_finite(patch: pytest.MonkeyPatch) -> None:
    """On one owner, where it is decomposed."""
    import torch.distributed as dist

    from spectral_scale.methods.galore import sharded_optimizer

    plain = sharded_optimizer.leading_subspace
    factor = float("nan") if dist.get_rank() else 1.0
    patch.setattr(sharded_optimizer, "leading_subspace", lambda g, r: plain(g * factor, r))


TWINS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    nothing_arrives: "",
    updates_are_lost: "",
    a_matrix_is_left_out: "GaLore is partly off",
    a_gradient_is_not_finite: "rank 1: GaLore projection: gradient of model.decoder.layers.",
}
"""Twin -> what all ranks say; nothing: they train other numbers."""


def train_twins(configs: list[Any]) -> list[Any]:
    """The right run, then each broken one; of one that fails, its first step's error."""
    results = []
    with one_process_group():
        for config, twin in zip(configs, [lambda _: None, *TWINS], strict=True):
            with pytest.MonkeyPatch.context() as patch:
                twin(patch)
                fails = bool(TWINS.get(twin))
                results.append(error_of_a_step(config) if fails else train_tiny(config))
    return results


def error_of_a_step(config: Any) -> str:
    from spectral_scale.errors import SpectralError

    run = run_with_gradients(config)
    with pytest.raises(SpectralError) as caught:
        run.backend.step(clip_grad_norm=0.0)
        run.controller.after_step()
    return str(caught.value)


def test_a_broken_twin_shows(corpus: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    names = ["right", *(twin.__name__ for twin in TWINS)]
    configs = [config_of(corpus, tmp_path / name, "fsdp2", 2, **DOUBLE) for name in names]
    ranks = run_distributed(train_twins, 2, configs, timeout_seconds=200)
    for index, message in enumerate(["", *TWINS.values()]):
        found = [rank[index] for rank in ranks]
        if message:
            assert all(message in error for error in found), found
        else:
            apart = distance(found, alone["fp64"]).loss
            assert (apart > 1e-5) is (index > 0), (names[index], apart)


# -- costs -------------------------------------------------------------------------------------

WIDTH, RANK, LAYERS = 128, 8, 2
SHAPES = [*[(WIDTH, WIDTH)] * 4, (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS
SIZES = [m * n for m, n in SHAPES]
DENSE = sum(SIZES)
PROJECTORS = sum(RANK * min(shape) for shape in SHAPES)
LOW = sum(2 * RANK * max(shape) for shape in SHAPES) + PROJECTORS
COSTLY = {"model__hidden_size": WIDTH, "model__num_layers": LAYERS, "spectral__spectral_rank": RANK}


def in_scope(scope: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*arguments: Any) -> Any:
        with scope:
            return function(*arguments)

    return inside


def costs(configs: list[Any]) -> list[dict[str, Any]]:
    """Bytes that two steps send, what a rank keeps, and the most that the second one takes."""
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.engine.measure import memory
    from spectral_scale.metrics.measures import tensor_bytes
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.memory import PeakMemory
    from spectral_scale.testing.tiny import build_from_config
    from spectral_scale.testing.traffic import TrafficCounter

    results = []
    with one_process_group():
        for config in configs:
            create_run_folder(Path(config.train.run_dir))
            run = build_from_config(config, detect_rank_info())
            loop = TrainingLoop(run, NullLog(), None)
            optimizer: Any = run.optimizer
            step, found = optimizer._step_projected, {"sent": []}
            for batch in run.loader.steps(0, 2):
                peak = PeakMemory()
                if config.parallel.backend == "deepspeed":  # it knows no DTensors
                    optimizer._step_projected = in_scope(peak, step)
                loop._forward_backward(batch)
                with TrafficCounter() as counter:
                    run.backend.step(clip_grad_norm=0.0)
                found["sent"].append(counter.payload_bytes)
                run.controller.after_step()
            shards, owners = optimizer._shards, optimizer._owners
            found |= {
                "foreign": sum(
                    shards.ranges(fqn)[shards.group.index][1]
                    for fqn, owner in owners.items()
                    if owner != shards.group.index
                ),
                "owned": tensor_bytes(optimizer.kept_apart()),
                "states": memory(run)["memory/states_bytes"],
                "rest": sum(prod(shape) for f, shape in shards.shapes.items() if f not in owners),
                "peak": peak.peak_bytes,
            }
            results.append(found)
    return results


@pytest.mark.parametrize(
    ("world", "hosts"), [(2, ("fsdp2", "zero0")), (4, ("zero2", "zero3", "hsdp"))], ids=str
)
def test_costs(world: int, hosts: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    """What owners do not hold of a gradient travels to them, once a step, and as much comes back;
    low-rank state is divided; what a step takes is of the size of a matrix."""
    configs = [config_of(corpus, tmp_path, host, world, 1, **COSTLY) for host in hosts]
    ranks = run_distributed(costs, world, configs, timeout_seconds=200)
    for index, host in enumerate(hosts):
        found = [rank[index] for rank in ranks]
        group = {"zero0": 1, "hsdp": 2}.get(host, world)
        copies = world // group
        first, second = (sum((f["sent"][i] for f in found), Counter()) for i in (0, 1))
        foreign = sum(f["foreign"] for f in found)
        if host == "zero2":  # flat buffers are cut inside group - 1 matrices at most
            assert foreign < (group - 1) * max(SIZES)
        else:
            assert foreign == pytest.approx(copies * DENSE * (group - 1) / group, rel=0.02)
        assert first["alltoall_base"] == second["alltoall_base"] == 2 * 4 * foreign, host
        assert first["broadcast"] == (4 * PROJECTORS * copies if copies > 1 else 0), host
        assert first["allreduce"] - second["allreduce"] <= world * (4 + 2 * 8) * (MATRICES + 1)
        for f in found:
            assert f["states"] == pytest.approx(f["owned"] + 8 * f["rest"] / group, rel=0.03), host
            # A thread of Gloo may hold the buffers of the exchange before for some microseconds
            # after it is complete: what a rank sends and receives of the others, at most 1.5.
            assert f["peak"] <= (5 + 1.5 if group > 1 else 2.1) * 4 * max(SIZES), host
        assert sum(f["owned"] for f in found) == 4 * LOW * copies, host
        assert_planned(configs[index], world, found)


def assert_planned(config: Any, world: int, found: list[dict[str, Any]]) -> None:
    """`plan` says what was counted, on top of what dense training keeps and sends."""
    spectral = replace(config.spectral, method="full")
    dense, plan = (
        plan_run(resolve(c, world_size=world), gpu_memory_bytes=80e9)
        for c in (replace(config, spectral=spectral), config)
    )
    group = projection_group(config.parallel, world)
    saved = 8 * DENSE / group - max(f["owned"] for f in found)
    flat = config.parallel.zero_stage in (1, 2)
    planned = dense.memory["optimizer"] - plan.memory["optimizer"]
    assert planned == pytest.approx(saved, rel=0.1 if flat else 0.02)
    sent = plan.step_traffic_bytes - dense.step_traffic_bytes
    counted = [f["sent"][1]["alltoall_base"] for f in found]
    if flat:
        assert max(counted) <= sent
    else:
        assert sent == pytest.approx(sum(counted) / world, rel=0.02)
    broadcast = sum(f["sent"][0]["broadcast"] for f in found) / world
    assert plan.boundary_traffic_bytes <= broadcast
