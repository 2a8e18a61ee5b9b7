"""`spectral-scale slurm`: a job script for a configuration, printed, checked or submitted."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from spectral_scale.cli.arguments import add_run_config, load_run_config, positive
from spectral_scale.cluster.rendezvous import job_rendezvous
from spectral_scale.cluster.requeue import requeue, requeue_decision
from spectral_scale.cluster.sbatch import SCRIPTS, render, tasks_a_node
from spectral_scale.config.load import ResolvedConfig
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import ConfigError

DESCRIPTION = """Write the job script of a run, after checking that the run fits on its GPUs.

The scripts themselves are in slurm/, what your site has to set is in slurm/env.sh. Keys of the
configuration are given as in `spectral-scale train`:
  spectral-scale slurm --config run.yaml --nodes 2 --submit --train.run_dir runs/big"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "slurm",
        help="write, check or submit a SLURM job script for a run",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_config(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print the script (the default)")
    what.add_argument("--test-only", action="store_true", help="have sbatch check it and estimate")
    what.add_argument("--submit", action="store_true", help="hand it to sbatch")
    what.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)
    what.add_argument("--conclude", type=int, metavar="CODE", help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", type=positive, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=_not_negative, default=8, metavar="G",
                        help="also the ranks a node; 0: a CPU job of one rank a node")  # fmt: skip
    parser.add_argument("--ranks-per-node", type=positive, metavar="R", help="of a CPU job")
    parser.add_argument("--cpus-per-rank", type=positive, default=16, metavar="C")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB",
                        help="of one GPU, for the check that the run fits")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="even if it does not fit by the plan")
    parser.add_argument("--launcher", choices=tuple(SCRIPTS), default="srun")
    for option, name in (
        ("partition", "NAME"), ("account", "NAME"), ("time", "HH:MM:SS"), ("job-name", "NAME"),
        ("signal", "B:USR1@SECONDS"), ("dependency", "LIST"), ("constraint", "LIST"),
    ):  # fmt: skip
        parser.add_argument(f"--{option}", metavar=name, help="as sbatch's")


def run(arguments: argparse.Namespace) -> int:
    """0, or sbatch's exit code; with --conclude the job's. Raises ConfigError."""
    loaded = load_run_config(arguments)
    run_dir = Path(loaded.config.train.run_dir)
    if arguments.facts:
        print(_facts(run_dir))
        return 0
    if arguments.conclude is not None:
        return _conclude(arguments.conclude, run_dir, since=arguments.since)
    _check(loaded, arguments)
    script = _script(arguments)
    if arguments.submit or arguments.test_only:
        return _sbatch(script, ["--test-only"] if arguments.test_only else [])
    print(script, end="")
    return 0


def _facts(run_dir: Path) -> str:
    """Run folder and rendezvous of a job, as quoted assignments of the shell."""
    address, port = job_rendezvous(os.environ)
    values = {"run_dir": str(run_dir), "master_addr": address, "master_port": str(port)}
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items())


def _conclude(code: int, run_dir: Path, *, since: float) -> int:
    """Requeue this job if its run was stopped, saved and got further; the job's exit code."""
    from spectral_scale.supervision.status import read_status

    job = os.environ.get("SLURM_JOB_ID", "")
    ending = requeue_decision(code, read_status(run_dir), job=job, since=since)
    print(f"the run ended with {ending.code} ({ending.reason})", flush=True)
    if ending.requeue:
        prevented = requeue(job)
        print("requeued" if prevented is None else f"not requeued: {prevented}", flush=True)
    return ending.code


def _check(loaded: ResolvedConfig, arguments: argparse.Namespace) -> None:
    """Raise ConfigError unless the run can start on these nodes and fits their GPUs."""
    from spectral_scale.plan.build import plan_run

    world_size = arguments.nodes * _ranks_a_node(arguments)
    resolved = resolve(loaded.config, world_size=world_size)
    plan = plan_run(resolved, gpu_memory_bytes=arguments.gpu_memory * 1e9)
    print(plan.summary(), file=sys.stderr)
    if plan.verdict == "no" and arguments.gpus_per_node and not arguments.force:
        raise ConfigError(
            f"{plan.summary()}; use more GPUs, a backend that shards more, a smaller "
            "micro_batch_size or activation checkpointing (`spectral-scale plan` shows each part), "
            "or give --force"
        )


def _ranks_a_node(arguments: argparse.Namespace) -> int:
    ranks: int = arguments.gpus_per_node or arguments.ranks_per_node or 1
    if arguments.ranks_per_node not in (None, ranks):
        raise ConfigError(
            f"--ranks-per-node {arguments.ranks_per_node} differs from --gpus-per-node {ranks}: "
            "a rank has one GPU; leave one of them out"
        )
    return ranks


def script_for(config: Path, *, nodes: int, gpus_per_node: int) -> str:
    """The job script that the command prints for a configuration file and these nodes."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    words = ["slurm", "--config", str(config), "--nodes", str(nodes)]
    arguments = parser.parse_args([*words, "--gpus-per-node", str(gpus_per_node)])
    arguments.overrides = []
    return _script(arguments)


def _script(arguments: argparse.Namespace) -> str:
    ranks = _ranks_a_node(arguments)
    tasks = tasks_a_node(arguments.launcher, ranks)
    header = {
        "nodes": str(arguments.nodes),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": str(arguments.gpus_per_node),
        "cpus-per-task": str(arguments.cpus_per_rank * ranks // tasks),
    }
    for option in ("partition", "account", "time", "job_name", "signal", "dependency",
                   "constraint"):  # fmt: skip
        if (value := getattr(arguments, option)) is not None:
            header[option.replace("_", "-")] = value
    return render(
        arguments.launcher,
        header=header,
        arguments=_train_arguments(arguments),
        environment={
            "SPECTRAL_SCALE_PYTHON": sys.executable,
            "SPECTRAL_SCALE_RANKS_PER_NODE": str(ranks),
        },
    )


def _train_arguments(arguments: argparse.Namespace) -> list[str]:
    """The words that gave the configuration, for `spectral-scale train`; files by whole path."""
    words = [w for file in arguments.config for w in ("--config", str(Path(file).resolve()))]
    if arguments.deepspeed is not None:
        words += ["--deepspeed", *([arguments.deepspeed] if arguments.deepspeed else [])]
    if arguments.deepspeed_config:
        words += ["--deepspeed_config", arguments.deepspeed_config]
    overrides: list[str] = arguments.overrides
    return words + overrides


def _sbatch(script: str, options: list[str]) -> int:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError(
            "sbatch is not installed here; run this on a login node of the cluster, or give "
            "--print and hand the script over yourself"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        return subprocess.run([sbatch, *options, file.name], check=False).returncode


def _not_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
