"""Ranks of one run as processes that a test may kill, stop and wait for."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from spectral_scale.cluster.rendezvous import free_port
from spectral_scale.metrics.history import load_history
from spectral_scale.testing.distributed import PRELOADED, become_rank
from spectral_scale.testing.tiny import tiny_words

ENDLESS: dict[str, Any] = {
    "model__num_layers": 1,
    "train__steps": 1_000_000,
    "train__eval_interval": 1_000_000,
    "train__micro_batch_size": 3,
    "data__validation_sequences": 4,
    "checkpoint__interval": 5,
    "metrics__progress": False,
    "health__hang_timeout_seconds": 4,
}


class Ranks:
    """Use as a context manager; whatever is left then is killed.

    Args:
        corpus: prepared data.
        run_dir: the run folder.
        world_size: number of ranks.
        before: called in every rank before it trains, with its rank.
        changes: of ENDLESS.
    """

    def __init__(
        self,
        corpus: Path,
        run_dir: Path,
        *,
        world_size: int = 2,
        before: Callable[[int], None] | None = None,
        **changes: Any,
    ) -> None:
        self.run_dir = run_dir
        words = ["train", *tiny_words(corpus, run_dir, **ENDLESS | changes)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.processes = [
            context.Process(target=_rank, args=(rank, world_size, port, words, before, run_dir))
            for rank in range(world_size)
        ]

    def __enter__(self) -> Self:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for process in self.processes:
            process.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(10)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for_step(self, step: int, seconds: float = 120.0) -> None:
        """Until a step has been logged; fails if a rank ends before."""
        deadline = time.monotonic() + seconds
        while steps_logged(self.run_dir) < step:
            assert time.monotonic() < deadline, self.output()
            assert all(p.is_alive() for p in self.processes), self.output()
            time.sleep(0.02)

    def exit_codes(self, seconds: float = 120.0) -> list[int | None]:
        """Wait for all; negative for a signal, None for one that goes on."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def output(self, rank: int | None = None) -> str:
        """What ranks printed."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        paths = [self.run_dir / f"output_{r}.txt" for r in ranks]
        return "\n".join(path.read_text() for path in paths if path.exists())

    def stacks(self, rank: int) -> str:
        """Stack traces that a rank left."""
        return (self.run_dir / "logs" / f"stacks_rank_{rank:05d}.txt").read_text()


def _rank(
    rank: int,
    world_size: int,
    port: int,
    words: list[str],
    before: Callable[[int], None] | None,
    run_dir: Path,
) -> None:
    from spectral_scale.cli import train
    from spectral_scale.cli.main import main

    become_rank(rank, world_size, port, run_dir / f"output_{rank}.txt")
    train._write_report = lambda run_dir: None  # the others would wait for rank 0's plots
    if before is not None:
        before(rank)
    sys.exit(main(words))


def change_loss(rank: int, where: set[tuple[int, int]], change: Callable[[Any], Any]) -> None:
    """From now on `change` stands between this rank's loss and its backward pass, at (rank, step)
    of `where`; for `before`."""
    from spectral_scale.engine import loop

    product, original = loop.token_loss_sum, loop.TrainingLoop._forward_backward

    def forward_backward(self: Any, batch: Any) -> Any:
        here = (rank, self.step + 1) in where
        loop.token_loss_sum = (lambda *a: change(product(*a))) if here else product
        return original(self, batch)

    loop.TrainingLoop._forward_backward = forward_backward  # type: ignore[method-assign]


def steps_logged(run_dir: Path) -> int:
    """The last step in metrics.jsonl."""
    return max((line["step"] for line in load_history(run_dir).current()), default=0)


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, as the run ended up."""
    lines = load_history(run_dir).current()
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
