"""SST's table of hyperbolic graph networks: one command that fills it, continues it, and shows it.

    python benchmarks/papers/graphs.py --data FOLDER [--only cora-nodes ...]
    python benchmarks/papers/graphs.py --render

FOLDER holds the folders cora, airport and disease_lp. Each finished run is one small file in
docs/papers/graphs, and is not run again. --render writes the table of docs/papers/graphs.md.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from papers.graph_runs import METHODS, SEEDS, TASKS, run, trials

PAGE = Path(__file__).parents[2] / "docs" / "papers" / "graphs.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
PUBLISHED = {
    "cora-nodes": {"full": 81.13, "lora-1": 45.5, "sst-1": 75.07, "lora-2": 64.73, "sst-2": 77.5},
    "cora-links": {"full": 94.62, "lora-1": 84.22, "sst-1": 91.11, "lora-2": 88.8, "sst-2": 91.89},
    "airport-nodes": {
        "full": 92.88,
        "lora-1": 85.75,
        "sst-1": 88.61,
        "lora-2": 89.06,
        "sst-2": 87.92,
    },
    "airport-links": {
        "full": 95.77,
        "lora-1": 94.01,
        "sst-1": 95.37,
        "lora-2": 94.75,
        "sst-2": 95.59,
    },
    "disease-links": {
        "full": 91.49,
        "lora-1": 84.29,
        "sst-1": 93.63,
        "lora-2": 91.38,
        "sst-2": 94.83,
    },
}
"""F1 of nodes and AUC of links in percent (arXiv 2405.15481, table 5)."""


def main(words: list[str] | None = None) -> int:
    """Run what is left, or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="folder of the data sets")
    what.add_argument("--render", action="store_true", help="write the table from the results")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of runs' names")
    parser.add_argument("--results", type=Path, default=PAGE.with_suffix(""))
    parser.add_argument("--steps", type=int, default=5000, help="at most so many steps a run")
    arguments = parser.parse_args(words)
    if arguments.render:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        table = render(read(arguments.results))
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    for trial in trials():
        file = arguments.results / f"{trial.name}.json"
        if file.exists() or not trial.name.startswith(tuple(arguments.only)):
            continue
        result = run(trial, arguments.data, steps=arguments.steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
        unfinished.replace(file)
        print(f"{trial.name}: {100 * result['test']:.1f} in {result['seconds']:.0f} s", flush=True)
    return 0


def read(folder: Path) -> dict[str, float]:
    """Percent on the test split by the run's name."""
    found = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json")}
    return {name: 100 * result["test"] for name, result in found.items()}


def render(results: dict[str, float]) -> str:
    """Mean and standard deviation over the seeds that were run, with what is published."""
    lines = ["| method | " + " | ".join(TASKS) + " |", "| --- " * (len(TASKS) + 1) + "|"]
    for method in METHODS:
        cells = []
        for task in TASKS:
            names = (f"{task}.{method}.{seed}" for seed in SEEDS)
            values = [results[name] for name in names if name in results]
            ours = f"{statistics.mean(values):.1f}" if values else "not run"
            if len(values) > 1:
                ours += f" ± {statistics.stdev(values):.1f}"
            published = PUBLISHED.get(task, {}).get(method)
            cells.append(ours if published is None else f"{ours} ({published})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
