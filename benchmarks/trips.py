"""Which files a batch, a swap and a checkpoint tensor pass on their way: traced, not guessed.

    python benchmarks/trips.py

Trains a tiny OPT by SST and prints, for each trip, the files of the package whose functions run:
a batch from the data to its gradients (one process), a swap (one process), and a tensor on its way
into a checkpoint and back under DeepSpeed ZeRO-3 (two processes). `docs/architecture.md` explains
the trips; this counts their files. Takes about a minute.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from equivalence import small_corpus

import spectral_scale
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny

PACKAGE = Path(spectral_scale.__file__).parent
ASIDE = ("testing/", "errors.py", "metrics/", "supervision/")
"""What every trip passes without taking part in it: the watch over the run, and its log."""


class Trace:
    """Collects the package's files whose functions run while it is on."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def _see(self, frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(PACKAGE)):
            file = str(Path(name).relative_to(PACKAGE))
            if not file.startswith(ASIDE) and file not in self.files:
                self.files.append(file)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, traced while it runs, threads that it starts included."""

        def traced(*arguments: Any, **keywords: Any) -> Any:
            sys.setprofile(self._see)
            threading.setprofile(self._see)
            try:
                return function(*arguments, **keywords)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)  # type: ignore[arg-type]

        return traced


def trace_run(config: Any, trips: dict[str, list[tuple[str, str, str]]]) -> dict[str, list[str]]:
    """Train, and return the files of each trip: (module, class, method) of where it happens."""
    import importlib

    traces = {trip: Trace() for trip in trips}
    for trip, places in trips.items():
        for module, owner, method in places:
            kind = getattr(importlib.import_module(f"spectral_scale.{module}"), owner)
            setattr(kind, method, traces[trip].around(getattr(kind, method)))
    train_tiny(config)
    return {trip: trace.files for trip, trace in traces.items()}


IN_ONE_PROCESS = {
    "a batch, from the data to its gradients": [
        ("data.loader", "TrainLoader", "_read_micro_batch"),
        ("engine.loop", "TrainingLoop", "_forward_backward"),
    ],
    "a swap": [("methods.sst.controller", "SpectralController", "after_step")],
}
ON_ZERO_3 = {
    "a tensor into a ZeRO-3 checkpoint": [("engine.loop", "TrainingLoop", "_save")],
    "a tensor out of a ZeRO-3 checkpoint": [("engine.build", "Run", "load")],
}


def main() -> int:
    """Print every trip's files."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        steps = {"checkpoint__interval": 4, "train__steps": 6}
        alone = tiny_config(corpus, Path(folder) / "one", **steps)
        found = run_distributed(trace_run, 1, alone, IN_ONE_PROCESS)[0]
        zero = {"parallel__backend": "deepspeed", "parallel__zero_stage": 3}
        for more in (6, 8):  # the second one goes on from the first one's checkpoint
            config = tiny_config(
                corpus, Path(folder) / "two", **zero | steps | {"train__steps": more}
            )
            for trip, files in run_distributed(trace_run, 2, config, ON_ZERO_3)[0].items():
                if files:
                    found[trip] = files
    for trip, files in found.items():
        print(f"{trip}: {len(files)} files")
        print("".join(f"    {file}\n" for file in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
