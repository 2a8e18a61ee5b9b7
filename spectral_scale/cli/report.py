"""`spectral-scale report`: one page about one run, or several compared."""

import argparse
import json
from pathlib import Path
from typing import Any

from spectral_scale.metrics.report.html import UNKNOWN, count, duration, number, size
from spectral_scale.metrics.report.page import build_report, save_report
from spectral_scale.metrics.sinks import to_plain


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the `subparsers` of the main parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="render report.html of a run, or compare several",
        description="Render one self-contained page about a run, or several compared.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: RUN/report.html; ./report.html for several runs)",
    )
    parser.add_argument(
        "--allow-different-data",
        action="store_true",
        help="compare runs although they were trained on different data",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how the numbers are printed"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the page, print its path and the headline numbers. Returns exit code 0."""
    report = build_report(args.runs, allow_different_data=args.allow_different_data)
    default = args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html")
    output = save_report(report, args.output or default)
    if args.format == "json":
        document = {"report": str(output), "runs": report.headlines}
        print(json.dumps(to_plain(document), indent=2, allow_nan=False))
        return 0
    for numbers in report.headlines:
        print(_summary(numbers))
    print(f"report: {output}")
    return 0


def _summary(numbers: dict[str, Any]) -> str:
    """Format a few lines about one run."""
    first, last, best = (
        number(numbers[f"validation_perplexity_{when}"]) for when in ("first", "last", "best")
    )
    resumed = ", ".join(map(count, numbers["resumed_at_steps"])) or "never"
    rows = {
        "state": numbers["state"],
        "steps": count(numbers["steps"]),
        "tokens": count(numbers["tokens"]),
        "validation perplexity": f"{first} first, {last} last, {best} best",
        "training loss": number(numbers["train_loss_last"], 5),
        "wall time": duration(numbers["wall_seconds"]),
        "tokens a second": number(numbers["tokens_per_second"]),
        "peak memory": size(numbers["peak_memory_bytes"]),
        "resumed at steps": resumed,
    }
    shown = {key: value for key, value in rows.items() if value != UNKNOWN}
    return "\n".join([numbers["name"], *(f"  {key:<22} {value}" for key, value in shown.items())])
