"""How the time of a boundary divides over processes, as a table.

    python tests/evidence/boundary_scaling.py --output docs/boundary_scaling.md

Trains an OPT of four blocks by SST under DistributedDataParallel on 1, 2 and 4 processes of this
machine, one thread each, and measures boundaries that decompose every matrix again.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from equivalence import small_corpus

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config

WORLDS = (1, 2, 4)
BOUNDARIES = 3
HEADER = ["processes", "boundary, wall", "of which SVD", "of which rebuild"]
HEADER += ["CPU of the busiest process", "CPU of all", "matrices of the busiest"]


def main() -> int:
    """Print the table, and write it if asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=512, help="of the model")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    lines = [_row(HEADER), _row(["---"] * len(HEADER))]
    print("\n".join(lines), flush=True)
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        for world in WORLDS:
            config = _config(corpus, Path(folder) / str(world), arguments.width)
            lines.append(_row(_cells(run_distributed(measure, world, config, timeout_seconds=900))))
            loads.append(os.getloadavg()[0])
            print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text(_page(arguments.width, loads, lines), encoding="utf-8")
    return 0


def measure(config: Any) -> dict[str, Any]:
    """Seconds of the fastest boundary on this rank, and how many matrices it owns."""
    from spectral_scale.engine.build import build_run
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.engine.run_folder import create_run_folder
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.facts import detect_rank_facts

    create_run_folder(Path(config.train.run_dir))
    run = build_run(config, detect_rank_facts())
    loop = TrainingLoop(run, NullLog(), None)
    found: list[dict[str, Any]] = []
    for batch in run.loader.steps(0, 1 + BOUNDARIES):
        loop._forward_backward(batch)
        run.backend.step(clip_grad_norm=1.0)
        run.backend.collective.barrier()
        started = time.process_time()
        report = run.controller.after_step()
        found.append({"wall": report.seconds, "cpu": time.process_time() - started})
        found[-1] |= report.phase_seconds
    run.backend.close()
    best = min(found[1:], key=lambda f: f["wall"])  # the first one reads back what it installed
    return best | {"matrices": len(list(run.controller.bank.items()))}


def _config(corpus: Path, run_dir: Path, width: int) -> Any:
    return tiny_config(
        corpus,
        run_dir,
        model__hidden_size=width,
        model__num_layers=4,
        model__num_heads=8,
        spectral__spectral_rank=width // 32,
        spectral__steps_per_iteration=1,
        spectral__iterations_per_round=1,
        train__steps=1 + BOUNDARIES,
        train__global_batch_size=4,
        train__micro_batch_size=1,
    )


def _cells(ranks: list[dict[str, Any]]) -> list[str]:
    seconds = [
        max(r["wall"] for r in ranks),
        max(r["decompose"] for r in ranks),
        max(r["rebuild"] for r in ranks),
        max(r["cpu"] for r in ranks),
        sum(r["cpu"] for r in ranks),
    ]
    matrices = max(r["matrices"] for r in ranks)
    return [str(len(ranks)), *(f"{s:.2f} s" for s in seconds), str(matrices)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _page(width: int, loads: list[float], lines: list[str]) -> str:
    title = f"# How a boundary divides over processes\n\n{(__doc__ or '').split(chr(10), 2)[2]}"
    table = "\n".join(lines)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{title}\nWidth {width}, {cores} CPU cores; load average of the machine between "
        f"{min(loads):.1f} and {max(loads):.1f} during the\nmeasurement, these processes included. "
        f"The fastest of {BOUNDARIES} boundaries; of each phase the slowest\nprocess. That the "
        "operations divide exactly is a test (`tests/distributed/test_boundary_scaling.py`);\n"
        f"the CPU seconds do not depend on the number of cores, the wall seconds do.\n\n{table}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
