"""Ranks of one run as processes of this machine, each the command that a user would start."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from spectral_scale.cluster.rendezvous import LOOPBACK, free_port
from spectral_scale.metrics.history import load_history

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TAIL_CHARACTERS = 2000
POLL_SECONDS = 0.1


class Ranks:
    """Use as a context manager; whatever is left then is killed.

    Args:
        command: what each rank runs, after `python -m`.
        world_size: number of ranks; one is a plain process without a launcher's environment.
        folder: where their output goes, a file for each rank.
        environment: added to that of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        world_size: int,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", *command]
        self._world_size, self._folder = world_size, folder
        base = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
        self._environment = {"OMP_NUM_THREADS": "1", **base, **(environment or {})}
        self._files: list[IO[bytes]] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        for rank in range(self._world_size):
            self._files.append(self._path(rank).open("wb"))
            self.processes.append(
                subprocess.Popen(
                    self._command,
                    env=self._environment | self._launched(rank, port),
                    stdin=subprocess.DEVNULL,
                    stdout=self._files[-1],
                    stderr=subprocess.STDOUT,
                )
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for file in self._files:
            file.close()

    def _launched(self, rank: int, port: int) -> dict[str, str]:
        if self._world_size == 1:
            return {}
        values = (rank, self._world_size, rank, self._world_size, LOOPBACK, port)
        return {name: str(value) for name, value in zip(LAUNCHED, values, strict=True)}

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.txt"

    def exit_codes(self, seconds: float) -> list[int | None]:
        """Wait for all at most so long; None for a rank that still runs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
            time.sleep(POLL_SECONDS)
        return [process.poll() for process in self.processes]

    def wait_for_step(self, run_dir: Path, step: int, seconds: float) -> bool:
        """Wait until a step is logged; False if a rank ends before, or if it takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            lines = load_history(run_dir).current()
            if any(line["step"] >= step for line in lines):
                return True
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(POLL_SECONDS)
        return False

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    def output(self, rank: int) -> str:
        """What a rank has printed."""
        return self._path(rank).read_text(encoding="utf-8", errors="replace")

    def tails(self) -> str:
        """The ends of what all ranks printed, for a report of a failure."""
        ends = [
            f"rank {rank}: {self.output(rank)[-TAIL_CHARACTERS:]}"
            for rank in range(self._world_size)
        ]
        return "\n".join(ends)
