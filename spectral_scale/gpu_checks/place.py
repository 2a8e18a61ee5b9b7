"""Where the checks run: on the GPUs of this machine, or on its CPU as a rehearsal."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from spectral_scale.errors import ConfigError
from spectral_scale.gpu_checks.catalogue import Check
from spectral_scale.metrics.measures import peak_memory_bytes

T = TypeVar("T")

PACKAGES = ("spectral-scale", "torch", "triton", "transformers", "deepspeed", "megatron-core")
REHEARSAL_RANKS = 2
"""Processes that stand for GPUs in a rehearsal."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The machine as a check sees it."""

    device: torch.device
    """The first GPU, or the CPU."""
    gpus: int
    """GPUs of this machine; in a rehearsal, the ranks that stand for them."""
    rehearsal: bool
    """Whether the checks run small and on the CPU, which tests the checks and no GPU."""
    folder: Path
    """An empty folder for what the check writes."""

    def choose(self, real: T, rehearsal: T) -> T:
        """The value for a GPU, or the small one for a rehearsal."""
        return rehearsal if self.rehearsal else real

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        """Begin to measure the peak of the device's memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """The largest memory of tensors since `reset_peak`; None where only a GPU could tell."""
        return peak_memory_bytes(self.device) if self.device.type == "cuda" else None


def find_place(folder: Path, *, rehearsal: bool) -> Place:
    """The GPUs of this machine, or its CPU for a rehearsal. Raises ConfigError without a GPU."""
    if rehearsal:
        return Place(
            device=torch.device("cpu"), gpus=REHEARSAL_RANKS, rehearsal=True, folder=folder
        )
    if missing := no_gpu():
        raise ConfigError(
            f"doctor --gpu checks GPUs, and {missing}; start it on a machine with one, or give "
            "--rehearsal to try the checks themselves on the CPU"
        )
    return Place(
        device=torch.device("cuda", 0),
        gpus=torch.cuda.device_count(),
        rehearsal=False,
        folder=folder,
    )


def no_gpu() -> str | None:
    """Why torch can use no GPU here; None if it can."""
    if torch.cuda.is_available():
        return None
    build = torch.version.cuda
    if build is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    if shutil.which("nvidia-smi") is None:
        return f"torch {torch.__version__} sees none (nvidia-smi is not here either)"
    return f"torch {torch.__version__} sees none: its CUDA {build} needs a newer driver, or all " \
           "GPUs are hidden"  # fmt: skip


def unmet(check: Check, place: Place) -> str | None:
    """Why a check cannot run here; None if it can."""
    if check.gpus > place.gpus:
        return f"needs {check.gpus} GPUs, and {place.gpus} is here"
    if place.device.type == "cuda":
        found = torch.cuda.get_device_properties(place.device).total_memory / 1e9
        if found < check.gigabytes:
            return f"needs a GPU with {check.gigabytes:g} GB, and this one has {found:.0f} GB"
    return None


def facts(place: Place) -> dict[str, str]:
    """Versions and devices, for the page; results of other ones are not kept."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    found["torch"] = torch.__version__
    if place.rehearsal:
        return found | {"device": f"{place.gpus} CPU processes (rehearsal)"}
    properties = torch.cuda.get_device_properties(place.device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {
        "device": f"{place.gpus} x {properties.name}, {properties.total_memory / 1e9:.0f} GB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "NCCL": nccl,
        "driver": _driver(),
    }


def _driver() -> str:
    """The NVIDIA driver's version, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip() or "unknown"
