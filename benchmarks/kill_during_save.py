"""SIGKILL at a random instant of a save, again and again: every resume ends with the same bits.

    python benchmarks/kill_during_save.py [--seeds 100] [--first 0] [--output FILE]

Each seed starts a tiny run (SST, a checkpoint every step), kills it at a random instant of a random
save, starts it again and compares every tensor of its last checkpoint and every loss with those of
a run that was left alone. Every fifth seed has two ranks, one or both of which are killed; every
other seed saves in the background. Exit code 0 only if all are equal.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from spectral_scale.checkpoint.names import list_checkpoints
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.cluster.rendezvous import free_port
from spectral_scale.metrics.history import load_history
from spectral_scale.testing.distributed import PRELOADED, become_rank

STEPS = 8
MAX_TRIES = 20
"""How often a seed is tried until the kill falls into its save."""
CONTEXT = multiprocessing.get_context("forkserver")


def words(run_dir: Path, *, background: bool) -> list[str]:
    """The training command."""
    values = {
        "model.hidden_size": 32,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.sequence_length": 32,
        "spectral.spectral_rank": 8,
        "spectral.steps_per_iteration": 3,
        "train.run_dir": run_dir,
        "train.steps": STEPS,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.eval_interval": 100,
        "data.validation_sequences": 2,
        "train.device": "cpu",
        "checkpoint.interval": 1,
        "checkpoint.keep_last": 1,
        "checkpoint.async_save": str(background).lower(),
        "health.hang_timeout_seconds": 6,
        "metrics.log_interval": 1,
        "metrics.tensorboard": "false",
        "metrics.progress": "false",
    }
    return ["train", *(f"--{key}={value}" for key, value in values.items())]


def rank_main(
    arguments: list[str],
    rank: int,
    world_size: int,
    port: int,
    kill: tuple[int, float] | None,
    output: Path,
) -> None:
    """One rank; `kill` is the save to die in, and after how long."""
    from spectral_scale.checkpoint.manager import CheckpointManager
    from spectral_scale.cli import train
    from spectral_scale.cli.main import main

    become_rank(rank, world_size, port, output)
    train._write_report = lambda run_dir: None
    if kill is not None:
        original, saves = CheckpointManager.save, 0

        def save(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal saves
            saves += 1
            if saves == kill[0]:
                threading.Thread(target=die_after, args=(kill[1],), daemon=True).start()
                output.with_suffix(f".saving{rank}").touch()
            path = original(self, *args, **options)
            output.with_suffix(f".saving{rank}").unlink(missing_ok=True)
            return path

        CheckpointManager.save = save  # type: ignore[method-assign]
    sys.exit(main(arguments))


def die_after(seconds: float) -> None:
    """SIGKILL to this process."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        time.sleep(0.0002)
    os.kill(os.getpid(), signal.SIGKILL)


def start(
    arguments: list[str],
    world_size: int,
    kill: tuple[int, float] | None,
    victims: list[int],
    output: Path,
) -> list[int | None]:
    """Run all ranks to their ends; their exit codes."""
    port = free_port()
    ranks = [
        CONTEXT.Process(
            target=rank_main,
            args=(arguments, rank, world_size, port, kill if rank in victims else None, output),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in ranks]


def content(run_dir: Path) -> dict[str, Any]:
    """Everything that must be equal."""
    reader = CheckpointReader.open(list_checkpoints(run_dir / "checkpoints")[0])
    lines = load_history(run_dir).current()
    return {
        "step": reader.step,
        "losses": [(x["step"], x["train/loss"]) for x in lines if "train/loss" in x],
        **{name: reader.read(name).numpy().tobytes() for name in reader.tensors},
    }


def kill_in_a_save(
    choice: random.Random, run_dir: Path, arguments: list[str], world_size: int, longest: float
) -> int:
    """Start a run and kill it in a save, again until the kill falls into one; the tries."""
    victims = [0] if world_size == 1 else choice.choice([[0], [1], [0, 1]])
    output = run_dir.with_suffix(".log")
    for tries in range(1, MAX_TRIES + 1):
        shutil.rmtree(run_dir, ignore_errors=True)
        kill = choice.randint(1, STEPS - 1), choice.uniform(0, longest)
        start(arguments, world_size, kill, victims, output)
        if any(output.with_suffix(f".saving{rank}").exists() for rank in victims):
            return tries
        longest *= 0.7  # it died after its save, or not at all
    sys.exit(f"{run_dir.name} was never killed in a save:\n{output.read_text()}")


def disturb(seed: int, run_dir: Path, longest: float) -> dict[str, Any]:
    """One seed: start, kill, start again."""
    world_size = 2 if seed % 5 == 4 else 1
    arguments = words(run_dir, background=seed % 2 == 1)
    tries = kill_in_a_save(random.Random(seed), run_dir, arguments, world_size, longest)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    half = any(name.startswith(".") for name in names)
    resumed = start(arguments, world_size, None, [], run_dir.with_suffix(".log"))
    return {
        "seed": seed,
        "world_size": world_size,
        "killed_in_a_save": True,
        "tries": tries,
        "half_saved": half,
        "resumed": resumed == [0] * world_size,
    }


def main() -> int:
    """All seeds; print and store the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    CONTEXT.set_forkserver_preload(PRELOADED)
    results, expected = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for world_size in (1, 2):
            alone = folder / f"alone{world_size}"
            output = alone.with_suffix(".log")
            codes = start(words(alone, background=False), world_size, None, [], output)
            if codes != [0] * world_size:
                sys.exit(f"the undisturbed run ended with {codes}:\n{output.read_text()}")
            expected[world_size] = content(alone)
        seconds = [
            line["checkpoint/save_seconds"]
            for line in load_history(folder / "alone1").current()
            if "checkpoint/save_seconds" in line
        ]
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            run_dir = folder / f"seed{seed}"
            result = disturb(seed, run_dir, 1.2 * sorted(seconds)[len(seconds) // 2])
            result["equal"] = (
                result["resumed"] and content(run_dir) == expected[result["world_size"]]
            )
            results.append(result)
            if not result["equal"]:
                print(json.dumps(result), run_dir.with_suffix(".log").read_text(), flush=True)
    summary = {
        "seeds": len(results),
        "killed_in_a_save": sum(r["killed_in_a_save"] for r in results),
        "of_those_with_half_a_checkpoint_on_disk": sum(r["half_saved"] for r in results),
        "two_ranks": sum(r["world_size"] == 2 for r in results),
        "bit_identical_resumes": sum(r["equal"] for r in results),
    }
    print(json.dumps(summary, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({**summary, "results": results}, indent=1) + "\n")
    return 0 if summary["bit_identical_resumes"] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
