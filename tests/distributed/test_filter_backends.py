"""What the filter sends and saves on each host, and that whatever it relies on is noticed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_settings import DEEPSPEED

from spectral_scale.errors import CheckpointError
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import assemble, distance
from spectral_scale.testing.tiny import (
    one_process_group,
    run_with_gradients,
    tiny_config,
    train_in_turn,
    train_tiny,
)

WORLD, STEPS, STOP = 2, 5, 3
SETTINGS: dict[str, Any] = {
    "model__num_layers": 3,
    "model__hidden_size": 64,  # so that ZeRO-1 and 2 cut between layers, not before them
    "spectral__method": "full",
    "train__steps": STEPS,
    "train__global_batch_size": 8,
    "train__micro_batch_size": 4,
    "train__eval_interval": STEPS,
    "data__validation_sequences": 1,
    "optimizer__eps": 1e-5,
    "optimizer__clip_grad_norm": 0.1,
    "filter__kind": "rational",
    "filter__strength": 3.0,
    "filter__graph": "knn",
    "filter__neighbors": 1,
    "filter__refresh_steps": 2,
    "filter__joint_loss_mu": 0.1,
}
HALF = {"train__precision": "bf16"}  # gradients are fp32 there, too, when they are filtered
PLAIN = {"filter__graph": "path", "filter__joint_loss_mu": 0.0}
HOSTS: dict[str, dict[str, Any]] = {
    "torch": {},
    "fsdp2": {"parallel__backend": "fsdp2"},
    "zero1": DEEPSPEED | {"parallel__zero_stage": 1},
    "zero2": DEEPSPEED | {"parallel__zero_stage": 2},
    "zero3": DEEPSPEED | {"parallel__zero_stage": 3},
}


def config_of(corpus: Path, folder: Path, host: str, **changes: Any) -> Any:
    return tiny_config(corpus, folder, **(SETTINGS | HOSTS[host] | changes))


# -- traffic ---------------------------------------------------------------------------------


def traffic(configs: list[Any]) -> list[dict[str, Any]]:
    """Calls and payload bytes of the filter in one step, measured and not; elements filtered."""
    from spectral_scale.testing.traffic import TrafficCounter

    found = []
    with one_process_group():
        for config in configs:
            run = run_with_gradients(config)
            counts: dict[str, Any] = {}
            for measure in (False, True):
                with TrafficCounter() as counter:
                    run.gradient_filter.apply(measure=measure)
                counts["measured" if measure else "plain"] = dict(counter.calls)
                counts["bytes"] = counter.payload_bytes["alltoall_base"]
            pieces = run.gradient_filter._shards
            held = [pieces.ranges(f)[pieces.group.index][1] for f in run.gradient_filter.fqns]
            found.append(counts | {"held": sum(held), "planned": planned(run.config)})
    return found


def planned(config: Any) -> int:
    """Bytes of the filter's all-to-alls in a step, as `spectral-scale plan` has them."""
    from spectral_scale.config.check import check_config
    from spectral_scale.plan.filter_needs import filter_needs
    from spectral_scale.plan.inventory import take_inventory

    inventory = take_inventory(config, check_config(config, world_size=WORLD))
    return filter_needs(config, inventory, world_size=WORLD).exchanged


def test_traffic(corpus: Path, tmp_path: Path) -> None:
    """Nothing where all nodes are at hand; on ZeRO-1 and 2, and for nodes inside cut matrices, one
    all-to-all there and one back, of less than what a rank holds; measuring adds one all-reduce."""
    cases: list[tuple[str, dict[str, Any]]] = [
        *((host, {}) for host in HOSTS),
        ("torch", {"filter__nodes": "rows"}),
        ("fsdp2", {"filter__nodes": "rows"}),
        ("zero3", {"filter__nodes": "heads"}),
        ("fsdp2", {"filter__nodes": "block_gains"}),
        ("zero2", {"filter__joint_loss_mu": 0.1}),
        ("zero1", HALF),
        ("zero2", HALF | {"filter__joint_loss_mu": 0.1}),
        ("zero3", HALF | {"filter__nodes": "heads"}),
        ("fsdp2", HALF | {"filter__nodes": "rows"}),
    ]
    configs = [
        config_of(corpus, tmp_path / str(i), host, **(PLAIN | changes))
        for i, (host, changes) in enumerate(cases)
    ]
    ranks = run_distributed(traffic, WORLD, configs, timeout_seconds=300)
    for rank in ranks:
        for (host, changes), found in zip(cases, rank, strict=True):
            where = (host, changes)
            inside = changes.get("filter__nodes") in ("rows", "heads")
            pairs = (host in ("zero1", "zero2") or inside) and host != "torch"
            gains = changes.get("filter__nodes") == "block_gains"
            sends = {"alltoall_base": 3 if "filter__joint_loss_mu" in changes else 2}
            expected = sends if pairs else {"allreduce": 1} if gains else {}
            assert found["plain"] == expected, where
            more = 0 if host == "torch" else 1
            total = expected.get("allreduce", 0) + more
            assert found["measured"].get("allreduce", 0) == total, where
            # A rank sends at most what it holds, and gets at most its slice of all.
            sent = found["bytes"] / sends["alltoall_base"] / 4
            slice_of_all = sum(r[cases.index((host, changes))]["held"] for r in ranks) / WORLD + 99
            limit = max(found["held"], slice_of_all)
            owned = changes.get("filter__nodes") in ("rows", "heads")
            assert sent <= (WORLD * limit if owned else limit), where
            assert (sent > 0) is pairs, where
            assert (rank[cases.index((host, changes))]["planned"] > 0) is pairs, where
    for case, found in zip(cases, zip(*ranks, strict=True), strict=True):
        if case[0] in ("zero1", "zero2"):
            # Planned is the most, 2 P / N for a cut in the middle. Embeddings fill most of rank 0
            # here: one layer of three is there, and fc2 of all layers stays on rank 1.
            most = max(rank["bytes"] for rank in found)
            assert 1.0 <= found[0]["planned"] / most <= 2.0, case
        elif case[1].get("filter__nodes") in ("rows", "heads") and case[0] != "torch":
            assert {rank["planned"] for rank in found} == {rank["bytes"] for rank in found}, case


# -- state -----------------------------------------------------------------------------------


def test_resume_is_bit_exact_and_state_moves_between_backends(corpus: Path, tmp_path: Path) -> None:
    """Stopped between two renewals of the graph. What ZeRO-2 on two ranks saved, one process and
    FSDP2 hold bit for bit after loading."""
    runs = []
    for host in ("zero2", "fsdp2"):
        runs += [
            (config_of(corpus, tmp_path / host / "straight", host), None),
            (config_of(corpus, tmp_path / host / "broken", host), STOP),
            (config_of(corpus, tmp_path / host / "broken", host), None),
        ]
    saved = tmp_path / "saved"
    runs.append((config_of(corpus, saved, "zero2", train__steps=STOP), None))
    ranks = run_distributed(train_in_turn, WORLD, runs, timeout_seconds=300)
    for rank in ranks:
        for straight, first, second in (rank[0:3], rank[3:6]):
            assert first["step"] == STOP and second["step"] == STEPS
            assert first["losses"] | second["losses"] == straight["losses"]
            assert_equal(second["tensors"], straight["tensors"])
    written = assemble([rank[6] for rank in ranks])
    parts = {key.split("/")[1] for key in written if key.startswith("filter/")}
    assert {"steps", "anchor", "drift"} < parts
    assert any(key.endswith("/graph") for key in written)
    shutil.copytree(saved, tmp_path / "copy")
    alone = config_of(corpus, saved, "torch", train__steps=STOP)
    elsewhere = config_of(corpus, tmp_path / "copy", "fsdp2", train__steps=STOP)
    assert_equal(assemble(run_distributed(train_tiny, 1, alone)), written)
    moved = run_distributed(train_tiny, WORLD, elsewhere, timeout_seconds=120)
    assert_equal(assemble(moved), written)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert not [k for k, v in expected.items() if not np.array_equal(found[k], v)]


# -- twins: each breaks one thing that the filter relies on, and must be noticed ----------------


def mix_up_layers_on_one_rank(patch: pytest.MonkeyPatch) -> None:
    """Slices arrive under other names."""
    import torch.distributed as dist

    from spectral_scale.parallel.exchange import Exchange

    plain = Exchange.forward

    def mixed(*arguments: Any, **keywords: Any) -> Any:
        parts = plain(*arguments, **keywords)
        same = parts[0].shape == parts[1].shape
        return [parts[1], parts[0], *parts[2:]] if same and dist.get_rank() else parts

    patch.setattr(Exchange, "forward", mixed)


def clip_before_the_filter(patch: pytest.MonkeyPatch) -> None:
    from spectral_scale.engine.loop import TrainingLoop

    plain = TrainingLoop._forward_backward

    def clipped(loop: Any, batch: Any) -> Any:
        loss = plain(loop, batch)
        backend = loop.run.backend
        gradients = backend._gradients_by_kind()
        for kind, norm in backend._norms_by_kind(gradients).items():
            backend._scale_gradients(gradients[kind], backend._clip_factor(norm, 0.1))
        return loss

    patch.setattr(TrainingLoop, "_forward_backward", clipped)


def keep_the_gradient(patch: pytest.MonkeyPatch) -> None:
    """Filter, and forget to write the result back."""
    from spectral_scale.parallel.exchange import Exchange

    plain = Exchange.backward
    patch.setattr(Exchange, "backward", lambda *a, **k: [t * 0 for t in plain(*a, **k)])


def sample_by_rank(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from spectral_scale.optim.filter import sampling

    plain = sampling.places_in_range
    patch.setattr(
        sampling,
        "places_in_range",
        lambda entries, span: plain((entries + dist.get_rank()).clamp_max(entries[-1]), span),
    )


def graphs_of_the_own_slice(patch: pytest.MonkeyPatch) -> None:
    """Renew graphs from this rank's part of the mean gradients alone."""
    from spectral_scale.parallel.flat_shards import ShardGroup

    plain = ShardGroup.sum
    small = 100  # other sums are of a few numbers
    patch.setattr(ShardGroup, "sum", lambda group, t: t if t.numel() > small else plain(group, t))


TWINS: list[Callable[[pytest.MonkeyPatch], None]] = [
    mix_up_layers_on_one_rank,
    clip_before_the_filter,
    keep_the_gradient,
    sample_by_rank,
    graphs_of_the_own_slice,
]


def train_twins(configs: list[Any]) -> list[dict[str, Any]]:
    """The right run, then each broken one; what an exception ends is told by its name."""
    results = []
    with one_process_group():
        for config, twin in zip(configs, [lambda _: None, *TWINS], strict=True):
            with pytest.MonkeyPatch.context() as patch:
                twin(patch)
                try:
                    results.append(train_tiny(config))
                except CheckpointError as error:
                    results.append({"refused": str(error)})
    return results


def test_a_broken_twin_shows(corpus: Path, tmp_path: Path) -> None:
    names = ["right", *(twin.__name__ for twin in TWINS)]
    configs = [config_of(corpus, tmp_path / name, "zero2") for name in names]
    ranks = run_distributed(train_twins, WORLD, configs, timeout_seconds=300)
    alone = run_distributed(train_tiny, 1, config_of(corpus, tmp_path / "alone", "torch"))[0]
    for index, name in enumerate(names):
        found = [rank[index] for rank in ranks]
        assert is_noticed(found, alone) is (name != "right"), name


def is_noticed(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> bool:
    """Whether a run was refused, has other graphs, or differs from the right one."""
    if "refused" in ranks[0]:
        return "written twice" in ranks[0]["refused"]
    try:
        found = distance(ranks, alone)
    except ValueError as error:
        return "shapes" in str(error)
    return found.loss > 1e-5 or found.weights > 1e-3
