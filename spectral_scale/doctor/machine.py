"""One machine by itself: versions, devices, compilers, limits, interfaces, ports."""

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from spectral_scale.cluster.interface import VARIABLES, addresses
from spectral_scale.cluster.rendezvous import LOOPBACK, PORTS
from spectral_scale.doctor.findings import Finding, fault, ok, warning
from spectral_scale.parallel.device import gpu_index, gpus_allotted, unseen_gpu_remedy
from spectral_scale.parallel.rank_info import RankInfo

PACKAGES = ("spectral-scale", "torch", "transformers", "safetensors", "numpy")
OPTIONAL = {"deepspeed": "deepspeed", "megatron": "megatron-core"}
"""parallel.backend -> the distribution it needs."""
OPEN_FILES = 4096
SOCKET_NAME_BYTES = 107
"""The longest name of a UNIX socket."""
SOCKET_TAIL_BYTES = 35
"""Longest suffix that Python's multiprocessing appends to the temporary folder to name a socket."""
SHARED_MEMORY = Path("/dev/shm")
SHARED_BYTES_PER_GPU = 64 << 20
"""Shared memory that NCCL may need between the GPUs of a host."""


def versions() -> dict[str, str]:
    """Distribution -> installed version, `absent` where there is none."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *OPTIONAL.values(), "mpi4py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def examine_machine(
    rank_info: RankInfo, backend: str | None, device: str = "auto"
) -> Iterator[Finding]:
    """Examine everything about this host that needs no other host.

    Args:
        rank_info: where this process stands.
        backend: parallel.backend of the run; None if no run is meant.
        device: train.device of the run.
    """
    yield from _packages(backend)
    yield from _devices(rank_info, device)
    yield from _compilers(backend)
    yield _open_files()
    yield _temporary_folder()
    yield _shared_memory()
    yield from _interfaces(rank_info)
    yield _ports()


def _packages(backend: str | None) -> Iterator[Finding]:
    found = versions()
    yield ok("versions", ", ".join(f"{name} {number}" for name, number in found.items()))
    package = OPTIONAL.get(backend or "")
    if package is not None and found[package] == "absent":
        yield fault(
            "backend",
            f"parallel.backend={backend} needs {package}, which is not installed",
            f"pip install 'spectral-scale[{backend}]'",
        )


def _devices(rank_info: RankInfo, device: str) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        allotted = gpus_allotted() if device == "auto" else None
        if allotted is not None:
            yield fault(
                "devices",
                f"this SLURM job has GPUs ({allotted}), but torch {torch.__version__} sees none",
                f"{unseen_gpu_remedy()}, or set train.device=cpu to use none",
            )
        elif shutil.which("nvidia-smi"):
            yield warning(
                "devices",
                f"nvidia-smi is here, but torch {torch.__version__} sees no GPU",
                unseen_gpu_remedy(),
            )
        else:
            yield ok("devices", f"no GPU, {os.cpu_count()} processors, {torch.get_num_threads()} "
                                "threads a rank")  # fmt: skip
        return
    count = torch.cuda.device_count()
    index = gpu_index(rank_info.local_rank)
    if index is None:
        yield fault(
            "devices",
            f"local rank {rank_info.local_rank} has no GPU: {count} are visible here",
            "start as many ranks a node as it has GPUs (--ntasks-per-node, --nproc-per-node)",
        )
        return
    properties = torch.cuda.get_device_properties(index)
    yield ok(
        "devices",
        f"GPU {index} of {count}: {properties.name}, {properties.total_memory / 1e9:.0f} GB",
    )


def _compilers(backend: str | None) -> Iterator[Finding]:
    """DeepSpeed builds some operators when they are first used; this project's path needs none."""
    needed = ["ninja", os.environ.get("CXX", "c++")]
    if torch.cuda.is_available():
        needed.append(os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"))
    missing = [name for name in needed if shutil.which(name) is None]
    if not missing:
        yield ok("compilers", f"{', '.join(map(os.path.basename, needed))} are here")
    elif backend == "deepspeed":
        yield warning(
            "compilers",
            f"not found: {', '.join(missing)}; DeepSpeed cannot build its own operators",
            "load the compiler and CUDA modules in slurm/env.sh and set CUDA_HOME; only "
            "operators that a DeepSpeed JSON asks for by name need them",
        )
    else:
        yield ok(
            "compilers", f"{', '.join(missing)} not found; only DeepSpeed's operators need them"
        )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return warning(
            "open files", f"limit {soft}", f"ulimit -n {min(hard, 65536)} before the start"
        )
    return ok("open files", f"limit {soft}")


def _temporary_folder() -> Finding:
    """Loader workers need none; other programs (compilers, profilers, launchers) do."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            folder = os.path.dirname(file.name)
    except OSError as error:
        return fault(
            "temporary folder",
            f"no temporary file can be made: {error.strerror or error}",
            "set TMPDIR to a folder that is there and can be written, with some space",
        )
    given = os.environ.get("TMPDIR")
    if given and not (os.path.isdir(given) and os.path.samefile(given, folder)):
        return warning(
            "temporary folder",
            f"TMPDIR={given} cannot be used, {folder} is taken instead",
            "set TMPDIR to a folder that is there and can be written",
        )
    length = len(os.fsencode(folder))
    if length + SOCKET_TAIL_BYTES > SOCKET_NAME_BYTES:
        return warning(
            "temporary folder",
            f"{folder} has {length} bytes; no UNIX socket can be made in it",
            f"set TMPDIR to a folder of at most {SOCKET_NAME_BYTES - SOCKET_TAIL_BYTES} bytes",
        )
    return ok("temporary folder", folder)


def _shared_memory() -> Finding:
    """Locks of `prepare --workers` live there, and NCCL's buffers between GPUs of a host."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    remedy = "start the container with --shm-size=1g (or --ipc=host)"
    if not os.access(SHARED_MEMORY, os.W_OK):
        return warning("shared memory", f"{SHARED_MEMORY} cannot be written", remedy)
    found = os.statvfs(SHARED_MEMORY)
    free = found.f_bavail * found.f_frsize
    text = f"{free / 2**20:.0f} MiB free in {SHARED_MEMORY}"
    if gpus > 1 and found.f_blocks and free < gpus * SHARED_BYTES_PER_GPU:
        return warning("shared memory", f"{text}, which is little for {gpus} GPUs", remedy)
    return ok("shared memory", text)


def _interfaces(rank_info: RankInfo) -> Iterator[Finding]:
    names = {v: os.environ.get(v, "").lstrip("=^").split(",")[0] for v in VARIABLES}
    own = addresses()
    text = ", ".join(f"{v}={name or 'unset'}" for v, name in names.items())
    if rank_info.world_size == 1:
        yield ok("interfaces", f"one process; {', '.join(sorted(own))} are up")
        return
    gone = [name for name in names.values() if name and not _matches(name, own)]
    several = rank_info.local_world_size not in (None, rank_info.world_size)
    loopback = [n for n in names.values() if any(a.startswith("127.") for a in own.get(n, ()))]
    if gone:
        yield fault(
            "interfaces",
            f"{text}: {', '.join(gone)} is not up here ({', '.join(sorted(own))} are)",
            "set them to the interface between the nodes in slurm/env.sh, or unset them",
        )
    elif several and loopback and not _meets_on_loopback():
        yield fault(
            "interfaces",
            f"{text}: no other host reaches {loopback[0]}",
            "set --network-interface, or both variables in slurm/env.sh",
        )
    else:
        yield ok("interfaces", text)


def _ports() -> Finding:
    """Ranks listen where the job's id says and, for gloo and NCCL, where the system says."""
    own = addresses().get(os.environ.get(VARIABLES[0], ""), [])
    host = next((address for address in own if "." in address), LOOPBACK)
    try:
        with (
            socket.create_server((host, 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            return ok("ports", f"a port of {host} can be listened on and reached")
    except OSError as error:
        return fault(
            "ports",
            f"no port of {host} can be listened on and reached: {error}",
            f"allow TCP among the job's hosts: {PORTS.start} to {PORTS.stop - 1} for rendezvous "
            "(or MASTER_PORT), and those that the system hands out, for gloo and NCCL",
        )


def _matches(name: str, own: dict[str, list[str]]) -> bool:
    """NCCL and gloo's variables may give a prefix."""
    return any(interface.startswith(name) for interface in own)


def _meets_on_loopback() -> bool:
    return os.environ.get("MASTER_ADDR", "").startswith("127.")
