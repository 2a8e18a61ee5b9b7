"""A run that hangs in its sixth step; its words are those of `spectral-scale train`.

On a GPU the main thread waits inside the driver for a kernel that spins for an hour; on the CPU it
sleeps. What must end the process is the watchdog beside the loop.
"""

import logging
import sys
import time
from pathlib import Path

import torch

from spectral_scale.config.load import load_config
from spectral_scale.gpu_checks.runs import train_here
from spectral_scale.supervision.run_folder import create_run_folder, log_to_file

BATCH = 5
SPIN_CYCLES = 10**13


def hang(run_dir: Path, device: str) -> None:
    """Wait for ever, after leaving a note that it begins."""
    (run_dir / "hangs").touch()
    if device == "cuda":
        torch.cuda._sleep(SPIN_CYCLES)
        torch.cuda.synchronize()
    time.sleep(3600)


def main(words: list[str]) -> None:
    """Train, and hang when batch `BATCH` is taken."""
    config = load_config([], words).config
    run_dir = Path(config.train.run_dir)
    create_run_folder(run_dir)
    log_to_file(run_dir, 0)
    logging.basicConfig(level=logging.INFO)

    def watch(number: int) -> None:
        if number == BATCH:
            hang(run_dir, config.train.device)

    train_here(config, watch=watch)


if __name__ == "__main__":
    main(sys.argv[1:])
