"""`spectral-scale plan`: what a run would need, before anybody waits for a GPU."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from spectral_scale.cli.arguments import add_format, add_run_config, load_run_config, positive
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import ConfigError

if TYPE_CHECKING:
    from spectral_scale.plan.build import Plan

DESCRIPTION = """Memory of a rank by part, bytes on the wire and the batch arithmetic of a run, by
formula: nothing is measured, and no GPU is needed. Keys are given as in `spectral-scale train`:
  spectral-scale plan --config run.yaml --world-size 16 --gpu-memory 80 --parallel.backend fsdp2"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "plan",
        help="memory, traffic and batch arithmetic of a run, computed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_config(parser)
    parser.add_argument("--world-size", type=positive, default=1, metavar="N", help="ranks")
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="of one rank's GPU (80)"
    )
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 whatever the verdict. Raises ConfigError for a run that cannot start."""
    if not arguments.gpu_memory > 0:
        raise ConfigError(f"--gpu-memory {arguments.gpu_memory} must be above 0 GB")
    from spectral_scale.plan.build import plan_run, to_json

    resolved = resolve(load_run_config(arguments).config, world_size=arguments.world_size)
    plan = plan_run(resolved, gpu_memory_bytes=arguments.gpu_memory * 1e9)
    print(json.dumps(to_json(plan), indent=1) if arguments.format == "json" else as_text(plan))
    return 0


PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "moments and masters",
    "bank": "triplets (or base weights) owned",
    "gathered": "gathered blocks and buffers",
    "activations": "activations of a micro-batch",
    "svd_workspace": "SVD workspace (not with activations)",
    "filter_workspace": "filter workspace (not with activations)",
    "reserved": "reserved",
}


def as_text(plan: "Plan") -> str:
    """The plan as lines for a terminal."""
    gb = 1e9
    lines = [
        plan.summary(),
        f"  {plan.parameters_trained / 1e6:,.1f} M elements train at a time, "
        f"{plan.parameters_frozen / 1e6:,.1f} M are frozen",
        f"  step: {plan.gradient_accumulation_steps} x {plan.micro_batch_size} sequences a rank, "
        f"{plan.tokens_per_step:,} tokens in all",
        "  memory of the fullest rank, GB:",
        *(f"    {PARTS[part]:<40}{size / gb:9.2f}" for part, size in plan.memory.items()),
        f"    {'peak':<40}{plan.peak_bytes / gb:9.2f}",
        f"    {'peak at the start':<40}{plan.start_peak_bytes / gb:9.2f}",
    ]
    if plan.host_bytes:
        lines.append(f"    {'in host memory instead':<40}{plan.host_bytes / gb:9.2f}")
    lines.append(f"  over each rank's links: {plan.step_traffic_bytes / gb:.3f} GB a step")
    if plan.boundary_every_steps:
        lines[-1] += (
            f", {plan.boundary_traffic_bytes / gb:.3f} GB more every "
            f"{plan.boundary_every_steps} steps"
        )
    lines.append(f"  a checkpoint: {plan.checkpoint_bytes / gb:.2f} GB on disk")
    return "\n".join(lines + [f"  assumed: {text}" for text in plan.assumptions])
