"""`spectral-scale doctor`: examine the machines of a job before a run depends on them."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_scale.cli.arguments import (
    add_format,
    add_launcher,
    add_run_config,
    launcher_flags,
    load_run_config,
)
from spectral_scale.cluster.adopt import adopt_launcher
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import ConfigError

if TYPE_CHECKING:
    from spectral_scale.doctor.examine import PlannedRun
    from spectral_scale.doctor.findings import Finding

DESCRIPTION = """Look at versions, devices, compilers, interfaces, the run folder's file system,
clocks and the speed of all-reduce and of products, on all ranks of a job. Start it as the run is:
  spectral-scale doctor --config run.yaml
  srun spectral-scale doctor --config run.yaml
Exit code 1 if something would make a run fail; each finding comes with its remedy."""


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


def run(arguments: argparse.Namespace) -> int:
    """Return 1 on all ranks if a run would fail here, else 0. Raises ConfigError, LaunchError."""
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
