"""Joining and leaving the run's process group; shared by every backend."""

import ctypes
from datetime import timedelta

import torch
import torch.distributed as dist

from spectral_scale.parallel.collective import Collective, ProcessGroup, SingleProcess
from spectral_scale.parallel.device import require_own_gpu
from spectral_scale.parallel.rendezvous_store import meet

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


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


def leave_group(*, failed: bool = False) -> None:
    """Leave the group, if there is one; collective unless this rank has failed."""
    if dist.is_initialized():
        if not failed:
            dist.barrier()
        dist.destroy_process_group()


def keep_until_exit(group: dist.ProcessGroup | None) -> None:
    """Never let the group's destructor run; the process's end frees it.

    gloo's thread takes the GIL to drop the tensors of its last collective, and the destructor joins
    that thread while it holds the GIL: a group that is freed too soon hangs the process for good.
    """
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
