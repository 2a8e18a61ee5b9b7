"""What a run says, and how soon, when a GPU is full or silent, or a rank is gone."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_scale.gpu_checks.findings import CheckFinding, Figure, at_most, holds
from spectral_scale.gpu_checks.place import Place
from spectral_scale.gpu_checks.rank_processes import Ranks
from spectral_scale.gpu_checks.runs import make_corpus, words_of
from spectral_scale.supervision.status import read_status

LIMIT_SECONDS = 60.0
"""A failure must be named within this time, at a hang timeout of `HANG_SECONDS`."""
HANG_SECONDS = 10.0
START_SECONDS = 150.0
"""Time for a run to reach its first steps."""
FULL_BYTES = 1.5e9
"""Memory that a run gets that needs more."""
ENDLESS = {
    "train.steps": 1_000_000,
    "checkpoint.interval": 5,
    "health.hang_timeout_seconds": HANG_SECONDS,
}


def check_out_of_memory(place: Place) -> CheckFinding:
    """A run on one rank that needs more memory than it is given."""
    corpus, run_dir = make_corpus(place.folder / "corpus"), place.folder / "run"
    changes: dict[str, Any] = {"model.vocab_size": 10**15}
    environment: dict[str, str] = {}
    if place.device.type == "cuda":
        total = torch.cuda.get_device_properties(place.device).total_memory
        share = FULL_BYTES / total
        environment["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.4f}"
        changes = {
            "model.name": "opt-1.3b",
            "model.hidden_size": "null",
            "model.num_layers": 4,
            "model.num_heads": "null",
        }
    command = ["spectral_scale", "train", *words_of(corpus, run_dir, place.device.type, changes)]
    started = time.monotonic()
    with Ranks(command, world_size=1, folder=run_dir / "output", environment=environment) as ranks:
        (code,) = ranks.exit_codes(START_SECONDS)
        seconds, output = time.monotonic() - started, ranks.output(0)
    reason = read_status(run_dir).get("reason", "")
    return CheckFinding(
        figures=[
            holds(
                "exit code",
                code not in (None, 0),
                value=str(code),
                required="not 0, by itself",
            ),
            says("status.json", reason, ("memory",)),
            says("what it printed", output, ("memory",)),
            at_most("seconds from its start to its end", seconds, START_SECONDS),
        ]
    )


def check_hang(place: Place) -> CheckFinding:
    """A rank whose main thread waits for a GPU that spins for ever."""
    corpus, run_dir = make_corpus(place.folder / "corpus"), place.folder / "run"
    changes = ENDLESS | {"train.steps": 1000}
    words = words_of(corpus, run_dir, place.device.type, changes)
    command = ["spectral_scale.gpu_checks.hanging_run", *words]
    with Ranks(command, world_size=1, folder=run_dir / "output") as ranks:
        hung_at = wait_for_file(run_dir / "hangs", START_SECONDS)
        (code,) = ranks.exit_codes(LIMIT_SECONDS + HANG_SECONDS)
        seconds = time.monotonic() - hung_at
        output = ranks.output(0)
    return CheckFinding(figures=hang_figures(run_dir, code, seconds, output))


def hang_figures(run_dir: Path, code: int | None, seconds: float, output: str) -> list[Figure]:
    """Whether a hanging rank was ended, named, and left its stack traces."""
    stacks = run_dir / "logs" / "stacks_rank_00000.txt"
    left = stacks.read_text(encoding="utf-8") if stacks.exists() else ""
    return [
        holds("exit code", code not in (None, 0), value=str(code), required="not 0, by itself"),
        says("the verdict", left + output, ("nothing has moved", "rank 0")),
        says("stack traces", left, ("hanging_run.py",)),
        at_most("seconds from the hang to the end", seconds, LIMIT_SECONDS),
    ]


def wait_for_file(path: Path, seconds: float) -> float:
    """The time at which a file was seen; the end of the wait if it never was."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return time.monotonic()


def check_lost_rank(place: Place) -> CheckFinding:
    """One of two ranks is killed, and one is stopped."""
    corpus = make_corpus(place.folder / "corpus")
    figures: list[Figure] = []
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        figures += lose_rank(place, corpus, name, number)
    return CheckFinding(figures=figures)


def lose_rank(place: Place, corpus: Path, name: str, number: signal.Signals) -> list[Figure]:
    """Send a signal to rank 1 of 2, and see what rank 0 says of it."""
    run_dir = place.folder / name
    words = words_of(corpus, run_dir, place.device.type, ENDLESS)
    with Ranks(
        ["spectral_scale", "train", *words], world_size=2, folder=run_dir / "output"
    ) as ranks:
        if not ranks.wait_for_step(run_dir, 6, START_SECONDS):
            raise RuntimeError(f"the run did not reach step 6: {ranks.tails()}")
        started = time.monotonic()
        ranks.signal(1, number)
        codes = ranks.exit_codes(LIMIT_SECONDS)
        seconds = time.monotonic() - started
    reason = read_status(run_dir).get("reason", "")
    return [
        holds(
            f"{name}: exit codes",
            None not in codes and 0 not in codes,
            value=str(codes),
            required="not 0, by themselves",
        ),
        says(f"{name}: status.json", reason, ("rank 1",)),
        at_most(f"{name}: seconds until all have ended", seconds, LIMIT_SECONDS),
    ]


def says(name: str, text: str, words: Sequence[str]) -> Figure:
    """Whether a text holds all of some words."""
    missing = [word for word in words if word not in text]
    value = f"does not say {', '.join(missing)}" if missing else "says so"
    return holds(name, not missing, value=value, required=f"to say {', '.join(words)}")
