"""Ranks find each other, or say within a minute which of them is missing and why."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from spectral_scale.errors import LaunchError

SECONDS_VARIABLE = "SPECTRAL_SCALE_MEETING_SECONDS"
"""How long ranks wait for the last one to start; longer where a file system is slow."""
DEFAULT_SECONDS = 60.0
LISTED = 8


def meet(world_size: int) -> tuple[Any, int]:
    """The ranks' store and this process's rank, once all are there. Collective.

    Reads RANK, MASTER_ADDR and MASTER_PORT, as torch does. Raises LaunchError.
    """
    rank, seconds = int(os.environ["RANK"]), _seconds()
    place = f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}"
    try:
        store = _store(rank, timedelta(seconds=seconds))
    except (dist.DistError, RuntimeError, OSError, ValueError) as error:
        raise LaunchError(_no_store(rank, place, error)) from None
    try:
        store.set(f"here/{rank}", socket.gethostname())
        missing = _wait(lambda: _missing(store, world_size), seconds)
    except dist.DistError:
        raise LaunchError(
            f"rank 0 at {place} left while rank {rank} waited for the others; its log says why"
        ) from None
    if missing:
        ranks = ", ".join(map(str, missing[:LISTED])) + (" ..." if len(missing) > LISTED else "")
        raise LaunchError(
            f"after {seconds:.0f} s at {place} these ranks of {world_size} are missing: {ranks}; "
            "look at their logs and hosts, and that the launcher starts as many as WORLD_SIZE "
            f"says; {SECONDS_VARIABLE} gives slow starts more time"
        )
    return store, rank


def _store(rank: int, timeout: timedelta) -> Any:
    """torchrun's own store where there is one; else rank 0's, which it does not wait in."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = rank == 0 and not agent
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not re-exported by name
        address, port, is_master=listens, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"spectral_scale/{attempt}", store)  # type: ignore[attr-defined]


def _missing(store: Any, world_size: int) -> list[int]:
    """Ranks that have not come; one question to the store while all is well."""
    if store.check([f"here/{rank}" for rank in range(world_size)]):
        return []
    return [rank for rank in range(world_size) if not store.check([f"here/{rank}"])]


def _wait(missing: Callable[[], list[int]], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (ranks := missing()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return ranks


def _seconds() -> float:
    text = os.environ.get(SECONDS_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise LaunchError(f"{SECONDS_VARIABLE}={text!r} must be a number of seconds above 0")
    return seconds


def _no_store(rank: int, place: str, error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"rank {rank} cannot listen at {place}: the port is taken{_holder()}; end that "
            "process, or set MASTER_PORT to another port for all ranks"
        )
    return (
        f"rank {rank} found no rank 0 at {place} ({first}); check that rank 0 is running there, "
        "that the name resolves on this host, and that no firewall is between them"
    )


def _holder() -> str:
    """Who listens there, as far as this user may know."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return ""
    for found in connections:
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port:
            return f" by process {found.pid}" if found.pid else ""
    return ""
