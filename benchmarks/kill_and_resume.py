"""A run killed three times at random must not differ by one bit from an undisturbed one.

    python benchmarks/kill_and_resume.py --data FOLDER --output FOLDER [--steps 2000]

FOLDER of --data holds `train` and `valid` made by `spectral-scale prepare`. Two runs of a 4-layer,
width-256 OPT (SST, residual storage) are trained: one straight through, one that gets SIGKILL at
three random steps and is started again each time. Prints a verdict, writes a report that compares
both, and exits with 0 only if every logged loss is equal.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from spectral_scale.metrics.history import load_history, read_metrics

KILLS = 3


def command(data: Path, run_dir: Path, steps: int) -> list[str]:
    """The training command of both runs; they differ in the run folder alone."""
    values = {
        "model.name": "opt-tiny",
        "model.num_layers": 4,
        "model.hidden_size": 256,
        "model.sequence_length": 128,
        "spectral.method": "sst",
        "spectral.storage": "residual",
        "spectral.spectral_rank": 16,
        "spectral.steps_per_iteration": 50,
        "data.train": data / "train",
        "data.validation": data / "valid",
        "data.validation_sequences": 64,
        "train.run_dir": run_dir,
        "train.steps": steps,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
        "train.eval_interval": max(1, steps // 10),
        "checkpoint.interval": max(1, steps // 20),
        "metrics.log_interval": 1,
    }
    overrides = [f"--{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", "spectral_scale", "train", *overrides]


def steps_done(run_dir: Path) -> int:
    """The last logged step of a run."""
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def run_and_kill(arguments: list[str], run_dir: Path, at_step: int, log: Path) -> int:
    """Start the run, SIGKILL it once it has logged `at_step`; the step it had reached."""
    with log.open("a") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output)
        while process.poll() is None and steps_done(run_dir) < at_step:
            time.sleep(0.2)
        if process.poll() is not None:
            sys.exit(f"the run ended by itself (exit code {process.returncode}); see {log}")
        process.send_signal(signal.SIGKILL)
        process.wait()
    return steps_done(run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, as a reader of the run sees them."""
    return {
        line["step"]: line["train/loss"]
        for line in load_history(run_dir).current()
        if "train/loss" in line
    }


def main() -> int:
    """Run both, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    straight, killed = arguments.output / "undisturbed", arguments.output / "killed"
    log = arguments.output / "output.log"
    arguments.output.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        whole = command(arguments.data, straight, arguments.steps)
        subprocess.run(whole, check=True, stdout=output, stderr=output)
    moments = sorted(random.Random(arguments.seed).sample(range(1, arguments.steps), KILLS))
    again = command(arguments.data, killed, arguments.steps)
    reached = [run_and_kill(again, killed, moment, log) for moment in moments]
    with log.open("a") as output:
        subprocess.run(again, check=True, stdout=output, stderr=output)

    expected, found = losses(straight), losses(killed)
    different = [step for step in expected if found.get(step) != expected[step]]
    report = arguments.output / "report.html"
    page = [sys.executable, "-m", "spectral_scale", "report", str(straight), str(killed)]
    subprocess.run([*page, "--output", str(report)], check=True, stdout=subprocess.DEVNULL)
    print(
        json.dumps(
            {
                "steps": arguments.steps,
                "losses_compared": len(expected),
                "killed_at_steps": reached,
                "resumed_at_steps": load_history(killed).resume_steps(),
                "losses_that_differ": len(different),
                "report": str(report),
            },
            indent=1,
        )
    )
    complete = len(expected) == arguments.steps and len(reached) == KILLS
    return 0 if complete and not different else 1


if __name__ == "__main__":
    sys.exit(main())
