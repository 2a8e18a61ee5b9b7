"""How the time of a swap divides over processes, as a table.

    python benchmarks/swap_scaling.py --output docs/swap_scaling.md

Trains an OPT of four blocks with SST under DistributedDataParallel on 1, 2 and 4 processes of this
machine, one thread each, and measures swaps that decompose every matrix again. Wall times are
omitted if the machine is busy with other work at the start.
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
SWAPS = 3
HEADER = ["processes", "swap, wall", "of which SVD", "of which rebuild"]
HEADER += ["CPU of the busiest process", "CPU of all", "matrices of the busiest"]


def main() -> int:
    """Print the table and optionally write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=512, help="width of the model")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    lines = [_row(HEADER), _row(["---"] * len(HEADER))]
    print("\n".join(lines), flush=True)
    cores = len(os.sched_getaffinity(0))
    loads = [os.getloadavg()[0]]
    idle = loads[0] < cores / 2
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        for world in WORLDS:
            config = _config(corpus, Path(folder) / str(world), arguments.width)
            ranks = run_distributed(measure, world, config, timeout_seconds=900)
            lines.append(_row(_cells(ranks, idle=idle)))
            loads.append(os.getloadavg()[0])
            print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text(_page(arguments.width, loads, lines), encoding="utf-8")
    return 0


def measure(config: Any) -> dict[str, Any]:
    """Seconds of the fastest swap on this rank, and the number of matrices that it owns."""
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.tiny import build_from_config

    create_run_folder(Path(config.train.run_dir))
    run = build_from_config(config, detect_rank_info())
    loop = TrainingLoop(run, NullLog(), None)
    found: list[dict[str, Any]] = []
    for batch in run.loader.steps(0, 1 + SWAPS):
        loop._forward_backward(batch)
        run.backend.step(clip_grad_norm=1.0)
        run.backend.collective.barrier()
        started = time.process_time()
        report = run.controller.after_step()
        found.append({"wall": report.seconds, "cpu": time.process_time() - started})
        found[-1] |= report.phase_seconds
    run.backend.close()
    # The first swap is left out: it also reads back what it scattered.
    best = min(found[1:], key=lambda f: f["wall"])
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
        train__steps=1 + SWAPS,
        train__global_batch_size=4,
        train__micro_batch_size=1,
    )


def _cells(ranks: list[dict[str, Any]], *, idle: bool) -> list[str]:
    wall = [max(r[key] for r in ranks) for key in ("wall", "decompose", "rebuild")]
    cpu = [max(r["cpu"] for r in ranks), sum(r["cpu"] for r in ranks)]
    shown = [f"{s:.2f} s" if idle else "-" for s in wall] + [f"{s:.2f} s" for s in cpu]
    return [str(len(ranks)), *shown, str(max(r["matrices"] for r in ranks))]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _page(width: int, loads: list[float], lines: list[str]) -> str:
    title = f"# How a swap divides over processes\n\n{(__doc__ or '').split(chr(10), 2)[2]}"
    table = "\n".join(lines)
    cores = len(os.sched_getaffinity(0))
    machine = (
        f"{cores} CPU cores, load average {loads[0]:.1f} at the start, {max(loads):.1f} at most"
    )
    return (
        f"{title}\nWidth {width}; {machine} (including these\nprocesses). The fastest of {SWAPS} "
        "swaps is shown, and for each phase the slowest process. A test\nholds that the operations "
        f"divide exactly (`tests/distributed/test_swap_scaling.py`).\n\n{table}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
