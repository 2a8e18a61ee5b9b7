"""A run that is disturbed at random ends with the same bits as one that is left alone.

    python benchmarks/soak.py --output FOLDER [--steps 2000] [--mean-seconds 30] [--seed 0]

Two ranks train a tiny OPT (SST) on the built-in corpus: once undisturbed, then under a random
fault every --mean-seconds on average: a rank killed, all ranks killed, a rank stopped (as a hang),
a byte of the newest checkpoint flipped, saving made impossible for want of space, the file STOP,
SIGTERM. NaN gradients are injected by data: the loss of some batches is NaN in both runs, so that
steps are left out and, at one place, the run goes back and passes over data. Whatever ends is
started again.
Exit code 0 only if every tensor of the last checkpoint and every loss is equal. Prints goodput.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from spectral_scale.checkpoint.names import list_checkpoints
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.cluster.rendezvous import free_port
from spectral_scale.metrics.history import load_history
from spectral_scale.testing.distributed import PRELOADED, become_rank

WORLD_SIZE = 2
CONTEXT = multiprocessing.get_context("forkserver")
LONGEST_SECONDS = 3600.0
FAULTS = ("kill a rank", "kill all", "stop a rank", "flip a byte", "no space", "STOP", "SIGTERM")
NAN_EVERY = 97
"""Each of these data steps has a loss that is not finite ..."""
NAN_ROW = range(120, 123)
"""... and so have these, so that the run goes back once (if it is as long)."""
LITTLE_SPACE = 4096
"""Bytes a file may have while a fault of the disk lasts."""


def rank_main(rank: int, port: int, words: list[str], log: Path, space: int | None) -> None:
    """One rank: training, with losses that are not finite at some data steps."""
    become_rank(rank, WORLD_SIZE, port, log)
    from spectral_scale.cli.main import main
    from spectral_scale.engine import loop

    product, original = loop.token_loss_sum, loop.TrainingLoop._forward_backward

    def forward_backward(self, batch):
        bad = batch.step % NAN_EVERY == NAN_EVERY - 1 or batch.step in NAN_ROW
        factor = float("nan") if bad and rank == batch.step % 2 else 1.0
        loop.token_loss_sum = lambda *a: product(*a) * factor
        return original(self, batch)

    loop.TrainingLoop._forward_backward = forward_backward
    if space is not None:
        _limit_checkpoint_files(space)
    sys.exit(main(words))


def _limit_checkpoint_files(size: int) -> None:
    """Writing beyond `size` bytes of a checkpoint's file fails, as on a full disk."""
    from spectral_scale.checkpoint import manager

    def small(path: Path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return open(path, "xb", buffering=0)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    manager.create_file = small
    manager.CheckpointManager.__init__.__kwdefaults__["open_new"] = small


def words(run_dir: Path, steps: int) -> list[str]:
    """The training command of both runs; they differ in the run folder alone."""
    values = {
        "model.name": "opt-tiny",
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.num_heads": 2,
        "model.sequence_length": 32,
        "spectral.spectral_rank": 8,
        "spectral.steps_per_iteration": 20,
        "train.run_dir": run_dir,
        "train.steps": steps,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.eval_interval": max(1, steps // 4),
        "data.validation_sequences": 8,
        "train.device": "cpu",
        "train.max_starts_without_progress": 0,
        "checkpoint.interval": 50,
        "checkpoint.keep_last": 6,
        "health.hang_timeout_seconds": 6,
        "metrics.log_interval": 1,
        "metrics.tensorboard": False,
        "metrics.progress": False,
    }
    return ["train", *(f"--{key}={value}" for key, value in values.items())]


@dataclass
class Ranks:
    """The processes of one start."""

    processes: list[BaseProcess]

    def running(self) -> bool:
        """Whether any rank is left."""
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """End all that is left."""
        for process in self.processes:
            process.kill()
            process.join()


def start(arguments: list[str], log: Path, *, little_space: bool = False) -> Ranks:
    """Start all ranks, as a launcher would."""
    port = free_port()
    space = LITTLE_SPACE if little_space else None
    ranks = [
        CONTEXT.Process(target=rank_main, args=(rank, port, arguments, log, space))
        for rank in range(WORLD_SIZE)
    ]
    for process in ranks:
        process.start()
    return Ranks(list[BaseProcess](ranks))


def flip_a_byte(run_dir: Path, choice: random.Random) -> None:
    """In the newest checkpoint; the run is not told."""
    newest = list_checkpoints(run_dir / "checkpoints")[:1]
    for folder in newest:
        with contextlib.suppress(OSError):  # it may be pruned at this moment
            file = choice.choice(sorted(folder.glob("*.safetensors")))
            data = bytearray(file.read_bytes())
            data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
            file.write_bytes(data)


def disturb(kind: str, ranks: Ranks, run_dir: Path, choice: random.Random) -> None:
    """Do it to a run that is under way."""
    victim = choice.choice(ranks.processes)
    if kind == "kill a rank":
        victim.kill()
    elif kind == "kill all":
        for process in ranks.processes:
            process.kill()
    elif kind == "stop a rank":
        os.kill(victim.pid, signal.SIGSTOP)
    elif kind == "flip a byte":
        flip_a_byte(run_dir, choice)
        for process in ranks.processes:
            process.kill()
    elif kind == "STOP":
        (run_dir / "STOP").touch()
    elif kind == "SIGTERM":
        os.kill(victim.pid, signal.SIGTERM)
    else:  # no space: only a new start can be given a smaller disk
        for process in ranks.processes:
            process.kill()


def is_complete(run_dir: Path) -> bool:
    """Whether the run has taken and saved its last step."""
    status = run_dir / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "completed"


def wait_for_training(ranks: Ranks, run_dir: Path) -> None:
    """Until this start has logged something: faults while modules load teach nothing."""
    metrics = run_dir / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    while ranks.running() and (metrics.stat().st_size if metrics.exists() else 0) == before:
        time.sleep(0.05)


def run_disturbed(run_dir: Path, steps: int, mean: float, choice: random.Random, log: Path) -> dict:
    """Until it is complete; counts faults, starts and seconds."""
    counts = dict.fromkeys(FAULTS, 0)
    started, starts, little_space = time.monotonic(), 0, False
    arguments, queue = words(run_dir, steps), list[str]()
    while True:
        ranks = start(arguments, log, little_space=little_space)
        starts += 1
        little_space = False
        wait_for_training(ranks, run_dir)
        pause = time.monotonic() + choice.expovariate(1 / mean)
        while ranks.running() and time.monotonic() < pause:
            time.sleep(0.05)
        if ranks.running() and not is_complete(run_dir):
            queue = queue or choice.sample(FAULTS, len(FAULTS))  # each kind once, then again
            kind = queue.pop()
            counts[kind] += 1
            little_space = kind == "no space"
            disturb(kind, ranks, run_dir, choice)
        limit = time.monotonic() + 90
        while ranks.running() and time.monotonic() < limit:
            time.sleep(0.05)
        left_behind, complete = ranks.running(), is_complete(run_dir)
        ranks.kill()
        if complete:  # a fault may strike a rank that has nothing left to do but to exit
            break
        if left_behind:
            sys.exit(f"ranks went on for 90 s after {kind!r}; see {log}")
        if time.monotonic() - started > LONGEST_SECONDS:
            sys.exit(f"not complete after {LONGEST_SECONDS:.0f} s; see {log}")
    seconds = time.monotonic() - started
    return {"starts": starts, "faults": counts, "seconds": round(seconds, 1)}


def differences(left: Path, right: Path) -> list[str]:
    """Losses and tensors of the last checkpoints that are not equal."""
    found = []
    curves = [
        {x["step"]: x["train/loss"] for x in load_history(run).current() if "train/loss" in x}
        for run in (left, right)
    ]
    if curves[0] != curves[1]:
        found.append("losses")
    readers = [
        CheckpointReader.open(list_checkpoints(run / "checkpoints")[0]) for run in (left, right)
    ]
    if readers[0].tensors != readers[1].tensors or readers[0].step != readers[1].step:
        return [*found, "steps or names of tensors"]
    for name in readers[0].tensors:
        if not readers[0].read(name).equal(readers[1].read(name)):
            found.append(name)
    return found


def productive_share(run_dir: Path) -> float:
    """Of all steps taken, those that the run ended up made of."""
    history = load_history(run_dir)
    taken = [line for line in history.lines if "train/tokens" in line or "health/skipped" in line]
    return len(history.current()) / max(len(taken), 1)


def main() -> int:
    """Run both, compare, print."""
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(PRELOADED)  # a start costs no loading of modules
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mean-seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    straight, disturbed = arguments.output / "undisturbed", arguments.output / "disturbed"
    for folder in (straight, disturbed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    log = arguments.output / "output.log"
    began = time.monotonic()
    ranks = start(words(straight, arguments.steps), log)
    for process in ranks.processes:
        process.join()
    codes = [process.exitcode for process in ranks.processes]
    if codes != [0, 0]:
        sys.exit(f"the undisturbed run ended with {codes}; see {log}")
    alone = time.monotonic() - began
    choice = random.Random(arguments.seed)
    result = run_disturbed(disturbed, arguments.steps, arguments.mean_seconds, choice, log)
    different = differences(straight, disturbed)
    print(
        json.dumps(
            {
                "steps": arguments.steps,
                **result,
                "undisturbed_seconds": round(alone, 1),
                "goodput": round(alone / result["seconds"], 3),
                "share_of_steps_kept": round(productive_share(disturbed), 3),
                "different": different,
            },
            indent=1,
        )
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
