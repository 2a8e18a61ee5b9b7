"""How far rounding carries the losses of several processes from those of one, step by step.

    python benchmarks/equivalence_rounding.py --output docs/equivalence_rounding.md

Trains an OPT of two blocks on two processes with 4 accumulation steps, and in one process with 2,
on the same batches and with the same triplets drawn. Batches, blocks and vocabulary are small; the
learning rates are those of a user: 1e-3, and 2e-3 for directions and singular values. SST swaps
after 16 and 32 steps, the second time with a re-SVD.
"""

import argparse
import base64
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from equivalence import FSDP2, small_corpus

from spectral_scale.metrics.plots import RUN_COLORS, Chart, Line, draw
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_in_turn

BATCH = 24
STEPS = 45
SETTINGS: dict[str, Any] = {
    "train__global_batch_size": BATCH,
    "model__num_heads": 4,
    "spectral__steps_per_iteration": 16,
    "optimizer__lr": 1e-3,
    "optimizer__spectral_lr": 2e-3,
}
EXACT = 1e-12
"""Largest accepted difference of a loss in fp64."""
PICTURE = "images/equivalence_rounding.svg"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One comparison of two processes with one: a column of the table."""

    method: str
    """`full` (dense training) or `sst`."""
    backend: str
    """DDP or FSDP2."""
    width: int
    """Hidden size of the model."""
    precision: str
    """fp32 or fp64."""

    @property
    def label(self) -> str:
        """The column's name."""
        method = "dense" if self.method == "full" else "SST"
        return f"{method}, {self.backend}, width {self.width}, {self.precision}"

    @property
    def alone(self) -> dict[str, Any]:
        """Settings in common with the run in one process."""
        return SETTINGS | {
            "spectral__method": self.method,
            "spectral__spectral_rank": self.width // 8,
            "model__hidden_size": self.width,
            "train__precision": self.precision,
        }

    @property
    def parallel(self) -> dict[str, Any]:
        """Settings of the two processes alone."""
        return FSDP2 if self.backend == "FSDP2" else {}


CURVES = [
    Curve(method="full", backend="DDP", width=64, precision="fp32"),
    Curve(method="sst", backend="DDP", width=64, precision="fp32"),
    Curve(method="full", backend="DDP", width=256, precision="fp32"),
    Curve(method="sst", backend="DDP", width=256, precision="fp32"),
    Curve(method="sst", backend="FSDP2", width=256, precision="fp32"),
    Curve(method="sst", backend="FSDP2", width=256, precision="fp64"),
]


def measure(curves: Sequence[Curve], steps: int) -> list[list[float]]:
    """For each curve, the largest difference of a loss up to each of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        one = {"train__micro_batch_size": BATCH // 2, "train__steps": steps}
        two = {"train__micro_batch_size": BATCH // 8, "train__steps": steps}
        shared: list[dict[str, Any]] = []
        for curve in curves:
            if curve.alone not in shared:
                shared.append(curve.alone)
        alone = _losses(corpus, 1, [settings | one for settings in shared])
        together = _losses(corpus, 2, [c.alone | c.parallel | two for c in curves])
    pairs = [
        (losses, alone[shared.index(c.alone)]) for c, losses in zip(curves, together, strict=True)
    ]
    return [np.maximum.accumulate(np.abs(np.subtract(a, b))).tolist() for a, b in pairs]


def _losses(corpus: Path, world: int, runs: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The losses of each run by step."""
    configs = []
    for settings in runs:
        run_dir = Path(tempfile.mkdtemp(dir=corpus)) / "run"
        configs.append((tiny_config(corpus, run_dir, **settings), None))
    results = run_distributed(train_in_turn, world, configs, timeout_seconds=3000)[0]
    return [[result["losses"][s] for s in sorted(result["losses"])] for result in results]


def table(curves: Sequence[Curve], found: Sequence[Sequence[float]]) -> str:
    """The differences of every fifth step, a column for each curve."""
    lines = [["up to step", *(c.label for c in curves)], ["---"] * (len(curves) + 1)]
    for step in (1, *range(5, len(found[0]) + 1, 5)):
        lines.append([str(step), *(f"{values[step - 1]:.0e}" for values in found)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def picture(curves: Sequence[Curve], found: Sequence[Sequence[float]]) -> bytes:
    """The curves as an SVG; where nothing differs yet, there is nothing to draw."""
    lines = [
        Line(
            x=np.arange(1.0, len(values) + 1),
            y=np.where(np.array(values) > 0, values, np.nan),
            color=color,
            label=curve.label,
        )
        for curve, values, color in zip(curves, found, RUN_COLORS, strict=False)
    ]
    chart = Chart(
        x_label="optimizer step",
        y_label="largest difference of a loss so far",
        lines=lines,
        log_y=True,
        inches=(9.0, 4.2),
    )
    return base64.b64decode(draw(chart).partition(",")[2])


PAGE = """# Rounding, step by step

{text}
Two processes add the same numbers in another order than one, so that their losses differ by
rounding. Training amplifies every difference, dense training as much as SST, on every backend
alike, and faster with larger learning rates and a wider model. In fp64 the same runs agree to the
last digits, so the difference in fp32 is rounding and nothing else: neither of the two runs is the
better one.

![Largest difference of a loss so far, by step]({picture})

{table}
"""


def main() -> int:
    """Print the table and optionally write the page; return 1 if fp64 is not exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    found = measure(CURVES, arguments.steps)
    print(table(CURVES, found))
    if arguments.output is not None:
        text = (__doc__ or "").split("\n", 2)[2]
        page = PAGE.format(text=text, picture=PICTURE, table=table(CURVES, found))
        arguments.output.write_text(page, encoding="utf-8")
        (arguments.output.parent / PICTURE).write_bytes(picture(CURVES, found))
    exact = [v[-1] for c, v in zip(CURVES, found, strict=True) if c.precision == "fp64"]
    return 0 if max(exact) < EXACT else 1


if __name__ == "__main__":
    sys.exit(main())
