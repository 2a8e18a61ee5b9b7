"""The README's picture of memory and traffic, dense AdamW and SST, as `spectral-scale plan` has it.

python benchmarks/plan_figure.py [--output docs/images/plan.svg]
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.plan.build import Plan, plan_run

RANKS = 8
MODEL = ["--model.name=opt-1.3b", "--model.sequence_length=2048", "--train.precision=bf16"]
MODEL += ["--train.global_batch_size=64", "--train.micro_batch_size=4"]
METHODS = {
    "dense AdamW": ["--spectral.method=full"],
    "SST, r = 64": ["--spectral.method=sst", "--spectral.spectral_rank=64"],
}
BACKENDS = {
    "DDP": ["--parallel.backend=torch"],
    "ZeRO-2": ["--parallel.backend=deepspeed", "--parallel.zero_stage=2"],
    "ZeRO-3": ["--parallel.backend=deepspeed", "--parallel.zero_stage=3"],
    "FSDP2": ["--parallel.backend=fsdp2"],
}
PARTS = {
    "weights": ("weights", "#1d4ed8"),
    "gradients": ("gradients", "#d9480f"),
    "optimizer": ("moments, masters", "#f59f00"),
    "bank": ("triplets owned", "#2b8a3e"),
}
INK, FAINT = "#1f2933", "#7b8794"
GB = 1e9


def plans() -> dict[str, Plan]:
    """By label, in the order in which they are drawn."""
    found = {}
    for backend, place in BACKENDS.items():
        for method, what in METHODS.items():
            config = load_config(overrides=[*MODEL, *place, *what]).config
            resolved = resolve(config, world_size=RANKS)
            found[f"{backend}   {method}"] = plan_run(resolved, gpu_memory_bytes=80 * GB)
    return found


def draw(found: dict[str, Plan], output: Path) -> None:
    """Two panels of horizontal bars."""
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    memory, traffic = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    rows = [row + 0.35 * (row // 2) for row in range(len(found))]
    _draw_memory(memory, rows, found)
    _draw_traffic(traffic, rows, found)
    memory.set_yticks(rows, list(found))
    memory.invert_yaxis()
    for axes in (memory, traffic):
        axes.tick_params(colors=INK, length=0, labelsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#cbd2d9")
        axes.grid(axis="x", color="#e4e7eb")
        axes.set_axisbelow(True)
    output.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(figure).print_svg(output, metadata={"Date": None})


def _draw_memory(axes: Axes, rows: list[float], found: dict[str, Plan]) -> None:
    left = [0.0] * len(found)
    for part, (title, color) in PARTS.items():
        widths = [plan.memory[part] / GB for plan in found.values()]
        axes.barh(rows, widths, left=left, color=color, label=title, height=0.8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _write_values(axes, rows, left)
    axes.set_title("held by a rank between steps, GB", fontsize=9.5, color=INK, loc="left")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")


def _draw_traffic(axes: Axes, rows: list[float], found: dict[str, Plan]) -> None:
    widths = [(p.step_traffic_bytes + _spread(p)) / GB for p in found.values()]
    axes.barh(rows, widths, color="#0b7285", height=0.8)
    _write_values(axes, rows, widths)
    axes.set_title("sent by a rank a step, GB", fontsize=9.5, color=INK, loc="left")


def _spread(plan: Plan) -> float:
    """A swap's bytes over the steps between swaps."""
    every = plan.boundary_every_steps
    return plan.boundary_traffic_bytes / every if every else 0.0


def _write_values(axes: Axes, rows: list[float], values: list[float]) -> None:
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            f"{value:.1f}", (value, row), (4, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    axes.set_xlim(0, max(values) * 1.12)


def main() -> None:
    """Draw and list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images/plan.svg"))
    output = parser.parse_args().output
    found = plans()
    draw(found, output)
    for label, plan in found.items():
        held = sum(plan.memory[part] for part in PARTS) / GB
        print(f"{label}: {held:.2f} GB held, {plan.step_traffic_bytes / GB:.2f} GB a step")


if __name__ == "__main__":
    main()
