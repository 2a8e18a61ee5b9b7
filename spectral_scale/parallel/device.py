"""The device of a rank."""

import os
import socket
from collections import Counter
from collections.abc import Mapping

import torch

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.collective import Collective

ALLOTTED = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
"""Variables in which SLURM lists the GPUs of a job or a step; those of SLURM_GPUS* count them."""


def pick_device(
    wanted: str, local_rank: int, environment: Mapping[str, str] = os.environ
) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means for this rank.

    Raises ConfigError if there is none, also where `auto` would leave GPUs of a SLURM job idle.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        index = gpu_index(local_rank)
        if index is None:
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} on this host; "
                "start fewer ranks a host, or set train.device=cpu"
            )
        return torch.device("cuda", index)
    if wanted == "cuda":
        raise ConfigError("train.device=cuda, but torch sees no GPU; set train.device=auto or cpu")
    allotted = gpus_allotted(environment)
    if allotted is not None:
        raise ConfigError(
            f"this SLURM job has GPUs ({allotted}), but torch {torch.__version__} sees none; "
            f"{unseen_gpu_remedy()}, or set train.device=cpu (--device cpu) to use none"
        )
    return torch.device("cpu")


def gpu_index(local_rank: int) -> int | None:
    """The index of this rank's GPU among those it can see; None if there are too few.

    A rank that sees one GPU has that one, whatever launcher bound it.
    """
    count = torch.cuda.device_count()
    if count == 1:
        return 0
    return local_rank if local_rank < count else None


def gpus_allotted(environment: Mapping[str, str] = os.environ) -> str | None:
    """The variable, as `NAME=value`, by which SLURM says that this process has GPUs; else None."""
    if not any(name.startswith("SLURM_JOB") for name in environment):
        return None
    names = [n for n in environment if n in ALLOTTED or n.startswith("SLURM_GPUS")]
    for name in sorted(names):
        value = environment[name]
        if value and value.rpartition(":")[2] != "0":
            return f"{name}={value}"
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    hidden = visible.startswith("-") or visible in ("", "NoDevFiles", "void", "none")
    return None if hidden else f"CUDA_VISIBLE_DEVICES={visible}"


def unseen_gpu_remedy() -> str:
    """How torch comes to see the GPUs that are there."""
    if torch.version.cuda is None:
        return "this torch is a build for CPUs: install the CUDA build"
    return (
        f"install a driver as new as this torch's CUDA {torch.version.cuda}, or a torch build of "
        "an older CUDA; in a container, pass the GPUs on (--nv, --gpus all)"
    )


def require_own_gpu(collective: Collective, device: torch.device) -> None:
    """Raise ConfigError on all ranks alike if two ranks of a host compute on the same GPU.

    NCCL could not run, or with other backends one GPU would do the work of two. Collective.
    """
    if collective.world_size == 1:
        return
    mine = None
    if device.type == "cuda":
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        mine = [socket.gethostname(), uuid]
    every = collective.gather_json(mine)
    problem = None if every is None else _shared_gpu([tuple(x) if x else None for x in every])
    problem = collective.broadcast_json(problem)
    if problem is not None:
        raise ConfigError(problem)


def _shared_gpu(places: list[tuple[str, str] | None]) -> str | None:
    """What is wrong if a (host, GPU) is that of several ranks; the first one is named."""
    counts = Counter(place for place in places if place is not None)
    place = next((place for place, count in counts.items() if count > 1), None)
    if place is None:
        return None
    ranks = [rank for rank, other in enumerate(places) if other == place]
    return (
        f"ranks {', '.join(map(str, ranks))} share one GPU of host {place[0]} ({place[1]}): each "
        "sees only that one; start one rank a GPU, give each task its own (srun --gpus-per-task=1 "
        "or --gpu-bind=none), or unset CUDA_VISIBLE_DEVICES"
    )
