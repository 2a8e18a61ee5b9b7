"""The whole examination of a job, gathered on rank 0."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spectral_scale.doctor.findings import Finding
from spectral_scale.doctor.group import examine_group
from spectral_scale.doctor.machine import examine_machine, versions
from spectral_scale.doctor.storage import examine_storage
from spectral_scale.parallel.device import gpu_index
from spectral_scale.parallel.group import join_group, leave_group
from spectral_scale.parallel.rank_info import RankInfo


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The run that is to be started; the defaults are those of no run in particular."""

    run_dir: Path
    """Folder that the run is to be written to."""
    backend: str | None = None
    """The value of `parallel.backend`."""
    device: str = "auto"
    """The value of `train.device`."""
    checkpoint_bytes: int = 0
    """Bytes of one checkpoint; 0 if unknown."""
    kept: int = 1
    """Number of checkpoints that are kept."""


def examine(subject: PlannedRun, rank_info: RankInfo) -> list[Finding]:
    """Findings of all ranks, the same list on each. Collective.

    Raises LaunchError, and ConfigError if two ranks have the same GPU.
    """
    mine = list(examine_machine(rank_info, subject.backend, subject.device))
    device = _device(subject, rank_info)
    collective = join_group(rank_info.world_size, device)
    mine += examine_storage(
        subject.run_dir,
        collective,
        checkpoint_bytes=subject.checkpoint_bytes,
        kept=subject.kept,
    )
    mine += examine_group(collective, device, versions())
    every = collective.gather_json([_signed(f, rank_info.rank).to_json() for f in mine])
    found: list[list[dict[str, object]]] = collective.broadcast_json(every)
    leave_group()
    return list(_condensed([Finding(**f) for of_rank in found for f in of_rank]))  # type: ignore[arg-type]


def _device(subject: PlannedRun, rank_info: RankInfo) -> torch.device:
    """The rank's GPU if it has one; what is wrong with it is a finding, not an error."""
    able = subject.device != "cpu" and torch.cuda.is_available()
    index = gpu_index(rank_info.local_rank) if able else None
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def _signed(finding: Finding, rank: int) -> Finding:
    return replace(finding, rank=rank, host=socket.gethostname())


def _condensed(findings: list[Finding]) -> Iterator[Finding]:
    """Each healthy finding once, from the first rank that has it; all other findings from all
    ranks."""
    said: set[str] = set()
    for finding in findings:
        if finding.verdict == "ok" and finding.name in said:
            continue
        if finding.verdict == "ok":
            said.add(finding.name)
        yield finding
