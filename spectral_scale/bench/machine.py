"""Describes the machine of a measurement and its other load."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

BUSY_SHARE = 0.5
"""Load of other processes, as a fraction of our threads, above which timings are not reliable."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The properties of a machine that a timing depends on."""

    cpu: str
    """The processor's model name."""
    cpu_capability: str
    """Vector instructions that torch uses."""
    cpus: int
    """Logical processors this process may run on."""
    memory_bytes: int
    gpu: str | None
    """Name of the device, if one was used."""
    system: str
    python: str
    torch: str


def describe_machine(device: torch.device) -> Machine:
    """Read the properties of this machine."""
    return Machine(
        cpu=_cpu_model(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpus=len(psutil.Process().cpu_affinity() or ()) or os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class LoadWatch:
    """Measures what others did from its creation on."""

    def __init__(self) -> None:
        self.average_at_start = os.getloadavg()[0]
        self._begin = time.perf_counter(), _busy_seconds(), time.process_time()

    def others(self) -> float:
        """Processors that other processes kept busy on average since creation."""
        wall, busy, own = (
            now - then
            for now, then in zip(
                (time.perf_counter(), _busy_seconds(), time.process_time()),
                self._begin,
                strict=True,
            )
        )
        return max(0.0, (busy - own) / wall)


def load_warning(*, average_at_start: float, others: float, threads: int) -> str | None:
    """A warning about load besides our own, if it is above half of our threads."""
    worst = max(average_at_start, others)
    if worst <= BUSY_SHARE * threads:
        return None
    return (
        f"other processes were running: load average {average_at_start:.2f} before the start, "
        f"{others:.2f} processors busy besides this process during it; at most "
        f"{BUSY_SHARE * threads:.1f} is allowed for {threads} thread(s). Seconds are too high and "
        "ratios may be off: repeat on an idle machine"
    )


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    waiting = times.idle + getattr(times, "iowait", 0.0)
    # guest time is contained in user time already
    extra = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - waiting - extra)
