"""`spectral-scale doctor`: examine the machines of a job before a run depends on them."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_scale.cli.arguments import (
    add_format,
    add_launcher,
    add_run_config,
    launcher_flags,
    load_run_config,
    require_one_process,
)
from spectral_scale.cluster.adopt import adopt_launcher
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import ConfigError

if TYPE_CHECKING:
    from spectral_scale.doctor.examine import PlannedRun
    from spectral_scale.doctor.findings import Finding
    from spectral_scale.gpu_checks.findings import Result

DESCRIPTION = """Look at versions, devices, compilers, interfaces, the run folder's file system,
clocks and the speed of all-reduce and of products, on all ranks of a job. Start it as the run is:
  spectral-scale doctor --config run.yaml
  srun spectral-scale doctor --config run.yaml
Exit code 1 if something would make a run fail; each finding comes with its remedy.

With --gpu it runs the GPU checks instead, without a launcher. Each has a process of its own and at
most 8 minutes; FOLDER/gpu_checks.md tells what they found (docs/gpu_checks.md).
  spectral-scale doctor --gpu
  spectral-scale doctor --gpu --only svd --only swap
Exit code 1 if a check failed or had no time, 78 if torch can use no GPU."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="examine the machines of a job",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_config(parser)
    add_launcher(parser)
    add_format(parser)
    group = parser.add_argument_group("GPU checks")
    group.add_argument("--gpu", action="store_true", help="run the GPU checks of this machine")
    group.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this check; may be repeated"
    )
    group.add_argument(
        "--resume", action="store_true", help="keep what passed before in the same folder"
    )
    group.add_argument(
        "--output",
        type=Path,
        default=Path("gpu_checks"),
        metavar="FOLDER",
        help="where page, results and logs go (gpu_checks)",
    )
    group.add_argument(
        "--rehearsal", action="store_true", help="try the checks themselves, small, on the CPU"
    )


def run(arguments: argparse.Namespace) -> int:
    """Return 1 on all ranks if a run would fail here, else 0. Raises ConfigError, LaunchError."""
    if arguments.gpu:
        return _check_gpus(arguments)
    if arguments.only or arguments.resume or arguments.rehearsal:
        raise ConfigError("--only, --resume and --rehearsal belong to --gpu, which was not given")
    # torch is imported from here on: the launcher has to be known before, and `--help` is quick.
    placement = adopt_launcher(launcher_flags(arguments))
    from spectral_scale.doctor.examine import examine
    from spectral_scale.doctor.findings import Finding, exit_code

    subject, unfit = _planned_run(arguments, world_size=placement.rank_info.world_size)
    findings = examine(subject, placement.rank_info)
    first = [Finding(name="ranks", verdict="ok", text=placement.note)]
    if placement.warning is not None:
        first.append(Finding(name="ranks", verdict="warning", text=placement.warning))
    findings = [*first, *([] if unfit is None else [unfit]), *findings]
    code = exit_code(findings)
    if placement.rank_info.rank == 0:
        if arguments.format == "json":
            print(json.dumps({"findings": [f.to_json() for f in findings], "exit_code": code}))
        else:
            print(as_text(findings), flush=True)
    return code


def _planned_run(
    arguments: argparse.Namespace, *, world_size: int
) -> "tuple[PlannedRun, Finding | None]":
    """The run that the arguments describe, if any, and why it cannot run on these ranks.

    One process may examine one machine of several, so a run that asks for more ranks is no more
    than a warning there.
    """
    from spectral_scale.doctor.examine import PlannedRun
    from spectral_scale.doctor.findings import Finding

    if not (arguments.config or arguments.overrides or arguments.deepspeed_config):
        return PlannedRun(run_dir=Path(os.getcwd())), None
    config = load_run_config(arguments).config
    subject = PlannedRun(
        run_dir=Path(config.train.run_dir),
        backend=config.parallel.backend,
        device=config.train.device,
        kept=config.checkpoint.keep_last,
    )
    try:
        resolved = resolve(config, world_size=world_size)
    except ConfigError as error:
        return subject, Finding(
            name="configuration",
            verdict="fault" if world_size > 1 else "warning",
            text=str(error),
            remedy="correct it, or start doctor on as many ranks as the run has",
        )
    from spectral_scale.plan.build import disk_bytes

    return replace(subject, checkpoint_bytes=disk_bytes(resolved)), None


def _check_gpus(arguments: argparse.Namespace) -> int:
    """Run the GPU checks that were asked for; 1 if one failed or had no time, else 0."""
    from spectral_scale.gpu_checks.catalogue import named

    require_one_process("doctor --gpu")
    if arguments.config or arguments.overrides or arguments.deepspeed_config:
        raise ConfigError("doctor --gpu brings its own runs; leave the configuration out")
    checks = named(arguments.only)
    from spectral_scale.gpu_checks.place import find_place
    from spectral_scale.gpu_checks.runner import PAGE, Session, exit_code, run_checks

    place = find_place(arguments.output.absolute(), rehearsal=arguments.rehearsal)
    results = run_checks(
        Session(place=place),
        checks,
        resume=arguments.resume,
        notify=lambda result: print(_check_line(result), file=sys.stderr, flush=True),
    )
    code = exit_code(results)
    page = place.folder / PAGE
    if arguments.format == "json":
        found = [result.to_json() for result in results]
        print(json.dumps({"checks": found, "page": str(page), "exit_code": code}))
    else:
        print(f"page: {page}")
    return code


def _check_line(result: "Result") -> str:
    """One line for a check that is done."""
    reason = f": {result.reason}" if result.reason else ""
    return f"{result.verdict:<8}{result.name} ({result.seconds:.0f} s){reason}"


SIGNS = {"ok": "ok     ", "warning": "WARNING", "fault": "FAULT  "}


def as_text(findings: "list[Finding]") -> str:
    """One line for each finding, and one for its remedy."""
    lines = []
    for finding in findings:
        where = "" if finding.verdict == "ok" else f" (rank {finding.rank}, {finding.host})"
        lines.append(f"{SIGNS[finding.verdict]} {finding.name}: {finding.text}{where}")
        if finding.remedy:
            lines.append(f"        -> {finding.remedy}")
    return "\n".join(lines)
