"""All ranks together: the same software and clocks, all-reduce and matrix products."""

import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from spectral_scale.doctor.findings import Finding, fault, ok, warning
from spectral_scale.parallel.collective import Collective

CLOCK_SECONDS = 2.0
"""Clocks that differ more than this make logs, leases and job ends hard to compare."""
SLOW = 0.8
"""A GPU below this fraction of the median speed is slow."""
REPEATS = 5


def examine_group(
    collective: Collective, device: torch.device, versions: dict[str, str]
) -> Iterator[Finding]:
    """Findings of rank 0 about all ranks; the others yield none. Collective."""
    yield from _same_versions(collective, versions)
    yield from _clocks(collective)
    yield from _all_reduce(collective, device)
    yield from _products(collective, device)


def _same_versions(collective: Collective, versions: dict[str, str]) -> Iterator[Finding]:
    every = collective.gather_json(versions)
    if every is None or collective.world_size == 1:
        return
    for name, first in every[0].items():
        other = {v: rank for rank, found in enumerate(every) if (v := found.get(name)) != first}
        for version, rank in other.items():
            yield fault(
                "versions",
                f"{name} is {first} on rank 0 and {version} on rank {rank}",
                "install the same versions on all nodes, best one environment on a shared disk",
            )


def _clocks(collective: Collective) -> Iterator[Finding]:
    collective.barrier()
    every = collective.gather_json(time.time())
    if every is None or collective.world_size == 1:
        return
    spread = max(every) - min(every)
    text = f"clocks differ by at most {spread:.2f} s (the barrier's own time included)"
    if spread <= CLOCK_SECONDS:
        yield ok("clocks", text)
    else:
        late = every.index(min(every))
        yield warning(
            "clocks", f"{text}; rank {late} is behind", "run chronyd or ntpd on all nodes"
        )


def _all_reduce(collective: Collective, device: torch.device) -> Iterator[Finding]:
    """All-reduce known numbers and measure the bandwidth per link of a ring all-reduce."""
    if collective.world_size == 1:
        return
    elements = (64 if device.type == "cuda" else 1) << 20
    world = collective.world_size
    data = torch.full((elements,), float(collective.rank + 1), device=device)
    dist.all_reduce(data)
    right = bool((data == world * (world + 1) / 2).all())
    seconds = _timed(lambda: dist.all_reduce(data), device)
    every = collective.gather_json([right, seconds])
    if every is None:
        return
    wrong = [rank for rank, (is_right, _) in enumerate(every) if not is_right]
    slowest = max(seconds for _, seconds in every)
    speed = 2 * (world - 1) / world * 4 * elements / slowest / 1e9
    text = f"all-reduce of {4 * elements >> 20} MiB over {world} ranks: {speed:.2f} GB/s a link"
    if wrong:
        yield fault("all-reduce", f"{text}, and wrong sums on ranks {wrong}", "run the vendor's "
                    "diagnostics (dcgmi diag -r 3) on their hosts, and leave them out")  # fmt: skip
    else:
        yield ok("all-reduce", text)


def _products(collective: Collective, device: torch.device) -> Iterator[Finding]:
    """A matrix product on every rank at a time: the slowest sets the pace of a run."""
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a = torch.ones(n, n, device=device, dtype=dtype)
    seconds = _timed(lambda: a @ a, device)
    every = collective.gather_json(2 * n**3 / seconds / 1e12)
    if every is None:
        return
    middle, slow = statistics.median(every), every.index(min(every))
    text = (
        f"{n} x {n} {str(dtype).removeprefix('torch.')} products: {middle:.2f} TFLOP/s (median), "
        f"{min(every):.2f} on rank {slow}"
    )
    if on_gpu and min(every) < SLOW * middle:
        yield warning(
            "products",
            text,
            "look at that GPU's clocks, temperature and ECC counts (nvidia-smi -q)",
        )
    else:
        yield ok("products", text)


def _timed(call: object, device: torch.device) -> float:
    """Seconds of one call, the best of some."""
    best = float("inf")
    for _ in range(REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        call()  # type: ignore[operator]
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
