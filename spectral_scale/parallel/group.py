"""Joining and leaving the run's process group; shared by every backend."""

import ctypes
from datetime import timedelta

import torch
import torch.distributed as dist

from spectral_scale.parallel.collective import Collective, ProcessGroup, SingleProcess

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def join_group(world_size: int, device: torch.device) -> Collective:
    """Meet the other ranks through the launcher's environment; one process needs no group.

    GPU tensors go through NCCL. Flags and JSON live on the CPU and go through gloo, so that asking
    all ranks a question between steps does not wait for the GPU.
    """
    if world_size == 1:
        return SingleProcess()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(host, timeout=COLLECTIVE_TIMEOUT)
    _keep_until_exit(dist.group.WORLD)
    return ProcessGroup(torch.device("cpu"))


def leave_group(*, failed: bool = False) -> None:
    """Leave the group, if there is one; collective unless this rank has failed."""
    if dist.is_initialized():
        if not failed:
            dist.barrier()
        dist.destroy_process_group()


def _keep_until_exit(group: dist.ProcessGroup | None) -> None:
    """Never let the group's destructor run; the process's end frees it.

    gloo's thread takes the GIL to drop the tensors of its last collective, and the destructor joins
    that thread while it holds the GIL: a group that is freed too soon hangs the process for good.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
