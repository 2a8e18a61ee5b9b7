"""`spectral-scale plan`: what a run would need, before anybody waits for a GPU."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spectral_scale.cli.arguments import add_format, add_run_config, load_run_config, positive
from spectral_scale.config.load import to_dict
from spectral_scale.config.resolve import resolve
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.plan.gpus import (
    GPUS,
    NETWORK_GIGABITS,
    Cluster,
    Gpu,
    Rates,
    assumed_rates,
    gpu_named,
    with_network,
)

if TYPE_CHECKING:
    from spectral_scale.plan.build import Plan

DEFAULT_MEMORY = 80e9
"""Bytes of a rank's GPU where nothing else is said."""

DESCRIPTION = """Memory of a rank by part, bytes on the wire and the batch arithmetic of a run, by
formula: nothing is measured, and no GPU is needed. Keys are given as in `spectral-scale train`:
  spectral-scale plan --config run.yaml --world-size 16 --gpu-memory 80 --parallel.backend fsdp2
With --gpu it also estimates the time of a step and of the run on nodes of that GPU (docs/plan.md):
  spectral-scale plan --config run.yaml --gpu a100-80gb --nodes 4 --gpus-per-node 8"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "plan",
        help="memory, traffic, batch arithmetic and time of a run, computed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_config(parser)
    parser.add_argument("--world-size", type=positive, metavar="N", help="ranks (1)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one rank's GPU (that of --gpu, or 80)"
    )
    group = parser.add_argument_group("time of a step and of the run")
    group.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    group.add_argument("--nodes", type=positive, metavar="N", help="nodes (1)")
    group.add_argument("--gpus-per-node", type=positive, metavar="G", help="ranks a node (8)")
    group.add_argument(
        "--network", type=float, metavar="GBIT", help=f"Gb/s a GPU, one way ({NETWORK_GIGABITS:g})"
    )
    group.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="JSON of `bench step` or of a bench check of `doctor --gpu`: measured rates",
    )  # fmt: skip
    group.add_argument("--energy", action="store_true", help="the energy of the run as well")
    group = parser.add_argument_group("several methods")
    group.add_argument(
        "--compare", metavar="A,B", help="these methods side by side: full,sst,lora,galore,..."
    )
    group.add_argument("--figure", type=Path, metavar="FILE", help="draw them as SVG as well")
    group = parser.add_argument_group("layouts")
    group.add_argument(
        "--search", action="store_true", help="the layouts with the shortest step that fit"
    )
    group.add_argument(
        "--write", type=Path, metavar="FILE",
        help="write the best layout's configuration, and FILE.sbatch for it",
    )  # fmt: skip
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 whatever the verdict. Raises ConfigError for a run that cannot start."""
    place = _place(arguments)
    config = load_run_config(arguments).config
    if arguments.figure is not None and arguments.compare is None:
        raise ConfigError("--figure draws a comparison; give --compare as well")
    if arguments.write is not None and not arguments.search:
        raise ConfigError("--write writes what a search found; give --search as well")
    if arguments.search and (arguments.compare is not None or not _timed(arguments)):
        raise ConfigError("--search needs --gpu (or --calibration), and not --compare")
    if arguments.search:
        return _search(arguments, config, place)
    if arguments.compare is not None:
        return _compare(arguments, config, place)
    if not _timed(arguments):
        return _plan(arguments, config, place)
    return _estimate(arguments, config, place)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a run is planned for, as far as the arguments say."""

    world_size: int
    nodes: int
    gpus_per_node: int
    gpu_memory: float | None
    """Bytes; None: that of the GPU."""

    def memory_of(self, gpu: Gpu) -> float:
        """Bytes of a rank's device: what was given, or those of the GPU."""
        return gpu.memory_bytes if self.gpu_memory is None else self.gpu_memory


def _place(arguments: argparse.Namespace) -> _Place:
    """Raises ConfigError for values that cannot be, or that contradict each other."""
    memory, nodes, gpus = arguments.gpu_memory, arguments.nodes, arguments.gpus_per_node
    if memory is not None and not memory > 0:
        raise ConfigError(f"--gpu-memory {memory} must be above 0 GB")
    timed = _timed(arguments)
    for option, given in (
        ("--nodes", nodes), ("--gpus-per-node", gpus), ("--network", arguments.network),
        ("--energy", arguments.energy or None),
    ):  # fmt: skip
        if given is not None and not timed:
            raise ConfigError(f"{option} is for estimates of time; give --gpu as well")
    world = (nodes or 1) * (gpus or 8) if timed else arguments.world_size or 1
    if timed and arguments.world_size not in (None, world):
        raise ConfigError(
            f"--world-size {arguments.world_size} differs from --nodes {nodes or 1} x "
            f"--gpus-per-node {gpus or 8}; leave --world-size out"
        )
    return _Place(
        world_size=world,
        nodes=nodes or 1,
        gpus_per_node=gpus or 8,
        gpu_memory=None if memory is None else memory * 1e9,
    )


def _timed(arguments: argparse.Namespace) -> bool:
    return arguments.gpu is not None or arguments.calibration is not None


def _compare(arguments: argparse.Namespace, config: RunConfig, place: _Place) -> int:
    from spectral_scale.plan import compare

    timed = _cluster(arguments, config, place) if _timed(arguments) else None
    memory = place.gpu_memory or DEFAULT_MEMORY
    rows = compare.compare(
        config,
        [name.strip() for name in arguments.compare.split(",") if name.strip()],
        world_size=place.world_size,
        gpu_memory_bytes=memory if timed is None else place.memory_of(timed[1].gpu),
        place=timed,
    )
    if arguments.figure is not None:
        from spectral_scale.plan.figure import draw

        plans = {row.name: row.plan for row in rows if row.plan is not None}
        times = [row.estimate.step_seconds for row in rows if row.estimate is not None]
        draw(plans, arguments.figure, seconds=times or None)
    if arguments.format == "json":
        print(json.dumps(compare.to_json(rows), indent=1))
    else:
        print(compare.as_text(rows))
    return 0


def _search(arguments: argparse.Namespace, config: RunConfig, place: _Place) -> int:
    from spectral_scale.plan import search

    file: Path | None = arguments.write
    for path in () if file is None else (file, _job_file(file)):
        if path.exists() or not path.parent.is_dir():
            raise ConfigError(
                f"--write {file}: {path} exists, or its folder does not; give another file"
            )
    rates, cluster = _cluster(arguments, config, place)
    memory = place.memory_of(cluster.gpu)
    found = search.search(config, rates, cluster, gpu_memory_bytes=memory)
    if arguments.format == "json":
        print(json.dumps(search.to_json(found), indent=1))
    else:
        print(search.as_text(found))
    if file is not None:
        layout = found.best[0].run.config
        # The vocabulary is that of the data again when the run starts.
        layout = replace(layout, model=replace(layout.model, vocab_size=config.model.vocab_size))
        _write(file, layout, cluster)
    return 0


def _job_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sbatch")


def _write(file: Path, config: RunConfig, cluster: Cluster) -> None:
    """Write a configuration and the job script that starts it."""
    from spectral_scale.cli.slurm import script_for

    file.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    script = script_for(file, nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node)
    _job_file(file).write_text(script, encoding="utf-8")


def _plan(arguments: argparse.Namespace, config: RunConfig, place: _Place) -> int:
    from spectral_scale.plan.build import plan_run, to_json

    resolved = resolve(config, world_size=place.world_size)
    plan = plan_run(resolved, gpu_memory_bytes=place.gpu_memory or DEFAULT_MEMORY)
    print(json.dumps(to_json(plan), indent=1) if arguments.format == "json" else as_text(plan))
    return 0


def _estimate(arguments: argparse.Namespace, config: RunConfig, place: _Place) -> int:
    from spectral_scale.plan import build, estimate

    rates, cluster = _cluster(arguments, config, place)
    resolved = resolve(config, world_size=cluster.world_size)
    memory = place.memory_of(cluster.gpu)
    plan, found = estimate.estimate_config(resolved, rates, cluster, gpu_memory_bytes=memory)
    if arguments.format == "json":
        print(json.dumps(build.to_json(plan) | {"estimate": estimate.to_json(found)}, indent=1))
    else:
        print(as_text(plan))
        print(estimate.as_text(found, energy=arguments.energy))
    return 0


def _cluster(
    arguments: argparse.Namespace, config: RunConfig, place: _Place
) -> tuple[Rates, Cluster]:
    """The rates and the cluster that the arguments name. Raises ConfigError."""
    gpu = None if arguments.gpu is None else gpu_named(arguments.gpu)
    if arguments.calibration is not None:
        from spectral_scale.plan.calibration import read_calibration

        measured = read_calibration(arguments.calibration, gpu, config.train.precision)
        gpu, rates = measured.device, measured.rates
    elif gpu is not None:
        rates = assumed_rates(gpu, config)
    else:
        raise ConfigError("give --gpu, or --calibration with what was measured on a processor")
    cluster = Cluster(gpu=gpu, nodes=place.nodes, gpus_per_node=place.gpus_per_node)
    if arguments.network is not None:
        cluster = with_network(cluster, arguments.network)
    return rates, cluster


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
