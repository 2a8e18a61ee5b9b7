"""Every method on every backend against one process, as a table.

    python benchmarks/equivalence_methods.py --output docs/equivalence_methods.md

Trains a tiny OPT in fp32 for ten steps with each method, with 4 accumulation steps and clipping, on
3 processes of this machine (HSDP: 4). The runs include two merges of ReLoRA* and two renewals of
GaLore's projectors. This takes some minutes on two cores. Each cell shows the largest difference of
a loss and of a weight.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from equivalence import BACKENDS, BATCH, SETTINGS, small_corpus

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_in_turn

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "relora": {},
    "galore": {},
    # All but fc2: its short stack has a null space, in which the basis is arbitrary.
    "frod": {"spectral__targets": "[q_proj,k_proj,v_proj,out_proj,fc1]"},
}
CLIPPED = {"optimizer__clip_grad_norm": 0.1}
OTHERS = ("residual", "tensor", "bf16", "fp64")
PLAIN = [name for name in BACKENDS if not any(word in name for word in OTHERS)]


def main() -> int:
    """Print the table and optionally write the page; return 1 if a cell exceeds the bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", nargs="*", default=PLAIN, choices=PLAIN)
    parser.add_argument("--output", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    lines = [_line(["backend", "processes", *METHODS]), _line(["---"] * (len(METHODS) + 2))]
    print("\n".join(lines), flush=True)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        alone = _train(corpus, 1, {"train__micro_batch_size": BATCH // 2})
        for name in arguments.backends:
            world = 4 if name.startswith("HSDP") else 3
            micro = {"train__micro_batch_size": BATCH // (world * 4)}
            ranks = _train(corpus, world, BACKENDS[name] | micro)
            found = [
                distance(results, one[0])
                for results, one in zip(
                    zip(*ranks, strict=True), zip(*alone, strict=True), strict=True
                )
            ]
            good &= all(d.loss < 1e-5 and d.steps_equal for d in found)
            cells = [f"{d.loss:.0e}, {d.weights:.0e}" for d in found]
            lines.append(_line([name, str(world), *cells]))
            print(lines[-1], flush=True)
    if arguments.output is not None:
        title = f"# Every method on every backend\n\n{(__doc__ or '').split(chr(10), 2)[2]}\n"
        arguments.output.write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


def _train(corpus: Path, world: int, settings: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Train all methods on `world` processes; the results by rank."""
    runs = []
    for method, changes in METHODS.items():
        run_dir = Path(tempfile.mkdtemp(dir=corpus)) / "run"
        given = SETTINGS | CLIPPED | settings | changes | {"spectral__method": method}
        runs.append((tiny_config(corpus, run_dir, **given), None))
    return run_distributed(train_in_turn, world, runs, timeout_seconds=500)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
