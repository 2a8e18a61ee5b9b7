"""`spectral-scale evaluate TARGET`: perplexity of a run, a checkpoint or a transformers folder."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectral_scale.cli.arguments import (
    add_device,
    add_format,
    count_or_all,
    positive,
    require_one_process,
)

DESCRIPTION = """Perplexity on prepared data.

TARGET is a run folder (its newest good checkpoint is taken), one checkpoint inside it, or a
transformers folder, as `export` writes it. The data must be prepared with the model's tokenizer.
Sequences are read as in training, without overlap; perplexity depends on their length."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="perplexity of a run, a checkpoint or an exported folder",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="run, checkpoint or folder")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="token folder (a run's validation data)"
    )
    parser.add_argument(
        "--sequences",
        type=count_or_all,
        metavar="N|all",
        help="read N sequences, spread evenly over the data (all)",
    )
    parser.add_argument(
        "--sequence-length", type=positive, metavar="S", help="tokens a sequence (as trained)"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="B", help="sequences a forward pass (as trained)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: as the run trained; fp32 for a folder",
    )
    add_device(parser)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print loss and perplexity. Returns exit code 0."""
    from spectral_scale.artifacts.perplexity import PerplexityRequest, measure_perplexity
    from spectral_scale.cli.progress import watch_batches

    require_one_process("evaluate")
    names = ("target", "data", "sequences", "sequence_length", "batch_size", "precision", "device")
    request = PerplexityRequest(**{name: getattr(arguments, name) for name in names})
    found = measure_perplexity(request, watch_batches("evaluating"))
    if arguments.format == "json":
        print(json.dumps(asdict(found)))
        return 0
    step = "" if found.step is None else f" at step {found.step}"
    print(f"{found.target}{step} on {found.data}")
    print(f"  perplexity {found.perplexity:.4f}, loss {found.loss:.6f} nats a token")
    print(
        f"  {found.tokens:,} tokens in {found.sequences:,} sequences of {found.sequence_length}, "
        f"{found.precision}"
    )
    if found.tokenizer == "not checked":
        print(
            "  the target has no tokenizer that could be checked: make sure the data's is the same"
        )
    return 0
