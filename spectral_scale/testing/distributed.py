"""Run a function in fresh processes that form a gloo group on this machine."""

import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

from spectral_scale.cluster.rendezvous import LOOPBACK, free_port

PRELOADED = [
    "spectral_scale.engine.loop",
    "spectral_scale.metrics.sinks",
    # Most of what DeepSpeed and megatron-core import: seconds of processor time in every rank.
    "torch._inductor.compile_fx",
    "torch._dynamo.repro.after_dynamo",
]
"""What the process that ranks are forked from has imported, so that they need not."""
JOIN_SECONDS = 10.0


class RankError(AssertionError):
    """A worker raised, died or did not finish; carries every rank's traceback."""

    def __init__(self, failures: dict[int, str], values: dict[int, Any]) -> None:
        listed = [f"--- rank {rank}:\n{text}" for rank, text in sorted(failures.items())]
        super().__init__("\n".join(listed))
        self.failures = failures
        """What became of the ranks that failed: a traceback, or how the process ended."""
        self.values = values
        """Results of the others."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """Call `function(*arguments)` in `world_size` fresh processes; their results by rank.

    The processes see torchrun's environment (RANK, WORLD_SIZE, MASTER_PORT, ...) and one thread
    each; with world size 1 they see none, as a plain process would. The function must be a
    module's own, and results must be picklable plain values or CPU tensors.

    Raises:
        RankError: with the tracebacks of the ranks that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results: Any = context.Queue()
    port = free_port()
    workers = [
        context.Process(
            target=_work,
            args=(function, arguments, rank, world_size, port, timeout_seconds, results),
            daemon=False,  # a rank may have loader workers of its own
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    try:
        _receive(workers, results, values, failures, timeout_seconds)
    finally:
        for worker in workers:
            worker.join(JOIN_SECONDS if not failures else 0.5)
            if worker.is_alive():
                worker.kill()
    if failures:
        raise RankError(failures, values)
    return [values[rank] for rank in range(world_size)]


def become_rank(rank: int, world_size: int, port: int, log: Path | None = None) -> None:
    """Make this process what torchrun would start on this machine: environment, one thread, and
    signals that end it. With world size 1 it is a plain process.

    Args:
        rank: of `world_size`; all are on this machine.
        world_size: number of ranks.
        port: where they meet.
        log: gets what the process prints from now on, added to what is there.
    """
    import torch

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR=LOOPBACK,
            MASTER_PORT=str(port),
            SPECTRAL_SCALE_MEETING_SECONDS="300",
        )


def _receive(
    workers: list[Any],
    results: Any,
    values: dict[int, Any],
    failures: dict[int, str],
    timeout_seconds: float,
) -> None:
    """Take results until every rank has given one, died, or the others are silent too long."""
    heard = time.monotonic()
    dead: set[int] = set()
    while waiting := set(range(len(workers))) - values.keys() - failures.keys():
        try:
            rank, value, failure = results.get(timeout=0.2)
            heard = time.monotonic()
            if failure is None:
                values[rank] = value
            else:
                failures[rank] = failure
            continue
        except Empty:
            pass
        for rank in waiting & dead:  # nothing more can be on its way
            failures[rank] = f"it ended with exit code {workers[rank].exitcode}"
        dead |= {rank for rank in waiting if workers[rank].exitcode is not None}
        if time.monotonic() - heard > timeout_seconds:
            for rank in waiting - dead:
                failures[rank] = f"no result after {timeout_seconds} s; it still runs"


def _work(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    timeout_seconds: float,
    results: Any,
) -> None:
    become_rank(rank, world_size, port)
    faulthandler.dump_traceback_later(0.9 * timeout_seconds)  # where a hanging rank stands
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
