"""Groups on GPUs, as far as a machine without one shows them: what is called in which order."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spectral_scale.parallel import group


class Group:
    """A process group that notes what is asked of it."""

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def abort(self) -> None:
        self._calls.append(f"abort {self._name}")

    def set_timeout(self, timeout: timedelta) -> None:
        self._calls.append(f"{self._name} {timeout.total_seconds():g}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called, with two groups that a run on GPUs has kept."""
    found: list[str] = []
    monkeypatch.setattr(group, "_kept", [Group(found, "all"), Group(found, "part")])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda *_: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "barrier", lambda *_: found.append("barrier"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda *_: found.append("destroy"))
    return found


def test_a_failed_rank_aborts_and_does_not_wait_for_the_others(calls: list[str]) -> None:
    group.leave_group(failed=True)
    assert calls == ["abort part", "abort all"]
    calls.clear()
    group.leave_group()
    assert calls == ["barrier", "destroy"] and not group._kept


def test_gloo_needs_no_abort(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda *_: "cpu:gloo,cuda:gloo")
    group.leave_group(failed=True)
    assert calls == ["destroy"]


def test_an_abort_that_hangs_does_not_keep_the_process(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(Group, "abort", lambda _: free.wait())
    monkeypatch.setattr(group, "ABORT_SECONDS", 0.1)
    started = time.monotonic()
    group.leave_group(failed=True)
    assert time.monotonic() - started < 5 and not calls
    free.set()


def test_every_group_that_is_kept_gets_the_limit(calls: list[str]) -> None:
    group.limit_waits(timedelta(seconds=77))
    assert calls == ["all 77", "part 77"]


def test_ranks_meet_on_the_device_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's first call on a group must not be a batch that some ranks skip."""
    made: list[Any] = []
    monkeypatch.setattr(group, "_kept", [])
    monkeypatch.setattr(group, "meet", lambda _: (None, 1))
    monkeypatch.setattr(group, "keep_until_exit", lambda _: None)
    monkeypatch.setattr(group, "ProcessGroup", lambda _: "collective")
    monkeypatch.setattr(group, "require_own_gpu", lambda *_: made.append("GPUs compared"))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: made.append("group"))
    monkeypatch.setattr(dist, "all_reduce", made.append)
    assert group.join_group(2, torch.device("meta")) == "collective"
    assert made[:2] == ["group", "GPUs compared"] and len(made) == 3
    assert made[2].device.type == "meta" and made[2].numel() == 1


def test_subgroups_of_gpus_open_no_gloo_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """All collectives in them take device tensors; but where tensor parallelism makes "shard" a
    group in which losses and flags are summed on the host, it keeps both."""
    from spectral_scale.backends.fsdp2 import backend

    asked: list[Any] = []

    class Mesh:
        def get_all_groups(self) -> list[Any]:
            return []

    def init(device: str, shape: tuple[int, ...], **options: Any) -> Mesh:
        asked.append((shape, options.get("backend_override")))
        return Mesh()

    monkeypatch.setattr(backend, "init_device_mesh", init)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    backend._mesh(gpu, 8, 8, 1)
    backend._mesh(gpu, 8, 4, 1)
    backend._mesh(gpu, 8, 8, 2)
    backend._mesh(cpu, 8, 4, 1)
    assert asked == [
        ((8,), None),
        ((2, 4), {"copy": "nccl", "shard": "nccl"}),
        ((4, 2), {"tensor": "nccl"}),
        ((2, 4), None),
    ]
