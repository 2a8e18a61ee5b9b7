"""`spectral-scale bench step`: what a training step costs on this machine."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from spectral_scale.bench.settings import StepSettings
from spectral_scale.cli.arguments import add_device, positive, require_one_process
from spectral_scale.errors import ConfigError

DESCRIPTION = """Time and memory of one training step: dense AdamW, SST (residual, residual of eight
bits, factored), its tangent form.

All take steps in turn, in one process, with the parts and defaults of `train`; a step's time
is split into forward, backward and optimizer (clipping and retraction included). Swaps are measured
by themselves and spread over the steps between them. Persistent state is counted and
compared with the formula. For figures that mean something, leave the machine otherwise idle; a
warning says when it was not."""


def add_parser(commands: Any) -> None:
    """Register the command and its one benchmark."""
    parser = commands.add_parser("bench", help="measure what a training step costs")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    step = benches.add_parser(
        "step",
        help="dense AdamW against every form of SST",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    d = StepSettings()
    step.add_argument("--model", default=d.model, help=f"a preset or a folder ({d.model})")
    step.add_argument(
        "--blocks", type=positive, metavar="N", help="transformer blocks (1, or all of the model)"
    )
    step.add_argument(
        "--whole-model", action="store_true", help="with embeddings, head and loss, not only blocks"
    )
    for name, of in _NUMBERS.items():
        default = getattr(d, name)
        option = f"--{name.replace('_', '-')}"
        step.add_argument(
            option, type=positive, default=default, metavar="N", help=f"{of} ({default})"
        )
    step.add_argument("--dtype", choices=("fp32", "bf16"), default=d.dtype, help="as in training")
    add_device(step)
    step.add_argument(
        "--format", choices=("markdown", "json"), default="markdown", help="how it is printed"
    )
    step.add_argument("--output", type=Path, metavar="FILE", help="write it to a file as well")


_NUMBERS = {
    "batch_size": "sequences a step",
    "sequence_length": "tokens a sequence",
    "threads": "threads on the CPU; with several, other load slows the thin products most",
    "spectral_rank": "triplets that train at a time",
    "steps": "timed steps of each variant",
    "warmup_steps": "untimed steps before",
    "steps_per_iteration": "T3, over which the time of swaps is spread",
}


def run(arguments: argparse.Namespace) -> int:
    """Print the measurement; 0. Raises ConfigError for settings that cannot run."""
    from spectral_scale.bench.render import to_json, to_markdown
    from spectral_scale.bench.step import bench_step

    require_one_process("bench step")
    output: Path | None = arguments.output
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; create it")
    if arguments.threads > (os.cpu_count() or 1):
        raise ConfigError(
            f"--threads {arguments.threads} given, this machine has {os.cpu_count()} processors"
        )
    names = ("model", "blocks", "whole_model", "dtype", "device", *_NUMBERS)
    settings = StepSettings(**{name: getattr(arguments, name) for name in names})
    found = bench_step(settings, lambda line: print(line, file=sys.stderr))
    text = to_json(found) if arguments.format == "json" else to_markdown(found)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if found.warning is not None:
        print(f"warning: {found.warning}", file=sys.stderr)
    return 0
