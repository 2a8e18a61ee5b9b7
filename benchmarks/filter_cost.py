"""What the spectral filter costs beside the step it is part of.

A stack of square linears stands for one kind of matrix of a model; what a real step does besides
(attention, other norms, the output layer) is left out, so that the filter's share is not flattered.
Processor seconds of one thread; steps and filters take turns in one run, so that all of them see
the same machine. Run from the repository's root:

    python benchmarks/filter_cost.py --width 2048 --layers 24 --tokens 4096
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectral_scale import FilterConfig, SpectralFilter
from spectral_scale.parallel.flat_shards import TensorShards

FILTERS = {
    "layers, path": FilterConfig(kind="rational"),
    "layers, knn": FilterConfig(kind="rational", graph="knn"),
    "rows, knn": FilterConfig(kind="rational", graph="knn", nodes="rows"),
    "block gains": FilterConfig(kind="rational", nodes="block_gains"),
}


class Stack(nn.Module):
    """Linears of one width, each added to what it reads."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(width, width, bias=False)}) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width)."""
        for block in self.layers:
            x = x + 0.1 * torch.relu(block["fc"](x))
        return x


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(width: int, layers: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of steps, of each filter's work in a step, and of a new graph."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Stack(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = torch.randn(tokens, width)
    pieces = TensorShards(dict(model.named_parameters()))
    roles = dict.fromkeys(pieces.shapes, "matrix")
    filters = {name: SpectralFilter(pieces, roles, config) for name, config in FILTERS.items()}
    found: dict[str, list[float]] = {"step": []} | {name: [] for name in filters}

    def forward_backward() -> None:
        model(inputs).square().mean().backward()

    def filter_step(chosen: SpectralFilter) -> None:
        chosen.apply()
        chosen.commit()

    for repeat in range(repeats + 1):  # the first one warms up, and builds the graphs
        spent = seconds(forward_backward)
        for name, chosen in filters.items():
            share = seconds(lambda chosen=chosen: filter_step(chosen))
            if repeat:
                found[name].append(share)
            elif chosen.config.graph == "knn":
                found[f"{name}: a new graph"] = [share]
        spent += seconds(optimizer.step)
        optimizer.zero_grad()
        if repeat:
            found["step"].append(spent)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, on one rank")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found = measure(options.width, options.layers, options.tokens, options.repeats)
    step = statistics.median(found["step"])
    print(
        f"{options.layers} matrices of {options.width} x {options.width}, {options.tokens} tokens "
        f"a step, one thread, medians of {options.repeats}, load {load:.1f} at the start and "
        f"{os.getloadavg()[0]:.1f} at the end"
    )
    print("| work | processor seconds | share of the step |")
    print("|---|---|---|")
    for name, values in found.items():
        median = statistics.median(values)
        share = "" if name == "step" else f"{median / step:.2%}"
        if name.endswith("a new graph"):
            share = f"{median / step / 200:.2%} (every 200 steps)"
        print(f"| {name} | {median:.3f} | {share} |")


if __name__ == "__main__":
    main()
