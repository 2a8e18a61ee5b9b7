"""Joining and leaving the run's process group; shared by every backend."""

import ctypes
import logging
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spectral_scale.parallel.collective import Collective, ProcessGroup, SingleProcess
from spectral_scale.parallel.device import require_own_gpu
from spectral_scale.parallel.rendezvous_store import meet

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits in a collective before torch gives up; a run sets its own by
`limit_waits`. Who hangs is said before that, by the watchdog: torch names no rank."""
ABORT_SECONDS = 10.0
"""Time for a failed rank to abort its communicators; its process ends after that anyway."""
_kept: list[dist.ProcessGroup] = []
"""The groups of this process that are never freed, that of all ranks first."""


def join_group(world_size: int, device: torch.device) -> Collective:
    """Meet the other ranks through the launcher's environment; one process needs no group.

    GPU tensors go through NCCL. Flags and JSON live on the CPU and go through gloo, so that asking
    all ranks a question between steps does not wait for the GPU. Raises LaunchError, and
    ConfigError if two ranks have the same GPU.
    """
    if world_size == 1:
        return SingleProcess()
    store, rank = meet(world_size)
    dist.init_process_group(
        _host(device), store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    keep_until_exit(dist.group.WORLD)
    collective = ProcessGroup(torch.device("cpu"))
    require_own_gpu(collective, device)  # before NCCL is used, which fails without the reason
    connect(device)
    return collective


def join_alone(device: torch.device) -> None:
    """A group of one process, for hosts that work on a group only."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not re-exported by name
    dist.init_process_group(_host(device), store=store, rank=0, world_size=1)
    keep_until_exit(dist.group.WORLD)


def _host(device: torch.device) -> str:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def present_group() -> Collective:
    """The default group that a user's own loop has set up; one process if there is none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return SingleProcess()
    on_cpu = "cpu:gloo" in dist.get_backend_config()
    return ProcessGroup(torch.device("cpu" if on_cpu else "cuda"))


def connect(device: torch.device) -> None:
    """Let all ranks meet once on `device`. Collective.

    NCCL's first call on a group must be one that every rank makes: a batch of sends and receives
    in which some ranks have no part is undefined before that.
    """
    dist.all_reduce(torch.zeros(1, device=device))


def subgroup_backends(device: torch.device, *names: str) -> dict[int | str, Any] | None:
    """`backend_override` of `init_device_mesh` for mesh dimensions whose collectives take tensors
    on `device` only: on a GPU, NCCL without the gloo connections of all pairs beside it."""
    return {name: "nccl" for name in names} if device.type == "cuda" else None


def limit_waits(timeout: timedelta) -> None:
    """Let collectives of all groups of this process that are kept wait as long as this."""
    for group in _kept:
        group.set_timeout(timeout)


def leave_group(*, failed: bool = False) -> None:
    """Leave the group, if there is one; collective unless this rank has failed.

    A failed rank aborts NCCL's communicators. To destroy them would first wait for collectives
    that the other ranks may never enter.
    """
    if not dist.is_initialized():
        return
    if failed and "nccl" in dist.get_backend_config():
        _abort()
        return
    if not failed:
        dist.barrier()
    dist.destroy_process_group()
    _kept.clear()


def _abort() -> None:
    """Abort every group, those of a part of the ranks first; never longer than ABORT_SECONDS."""

    def abort_all() -> None:
        for group in reversed(_kept):
            try:
                group.abort()
            except RuntimeError as error:
                logger.warning("a process group could not be aborted: %s", error)

    thread = threading.Thread(target=abort_all, name="abort", daemon=True)
    thread.start()
    thread.join(ABORT_SECONDS)


def keep_until_exit(group: dist.ProcessGroup | None) -> None:
    """Never let the group's destructor run; the process's end frees it.

    gloo's thread takes the GIL to drop the tensors of its last collective, and the destructor joins
    that thread while it holds the GIL: a group that is freed too soon hangs the process for good.
    """
    if group is None or any(group is kept for kept in _kept):
        return
    _kept.append(group)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def separate(collective: Collective) -> Collective:
    """A second gloo group of the ranks of `collective`. Collective.

    Collectives of two threads on one group could meet in a different order on each rank.
    """
    if collective.world_size == 1:
        return SingleProcess()
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    keep_until_exit(group)
    return ProcessGroup(torch.device("cpu"), group)
