"""What all ranks must agree on in every step, in one small all-reduce on the host.

Ranks must never act on what only one of them knows: one that stops while the others go on leaves
them waiting in the next collective for ever. So each rank reports what it has seen, the reports
are added up, and every rank draws the same conclusions from the same sum.

A sum can carry all of it because each kind of report has slots of its own. With two ranks the
tensor has 11 slots of float64, 88 bytes. Say rank 0 finds the file SAVE, and rank 1 has received
SIGTERM (15):

    slot     meaning                                         rank 0   rank 1      sum
    0 1 2    the file STOP, by manner                         0 0 0    0 0 0    0 0 0
    3 4      the time is up; the launcher is gone               0 0      0 0      0 0
    5        the file SAVE                                        1        0        1
    6        this rank's part of a background save is done        0        1        1
    7 8      signal received, a slot for each rank              0 0     0 15     0 15
    9 10     seconds of own work, a slot for each rank        0.2 0    0 0.3  0.2 0.3

All ranks conclude: save, stop because of "SIGTERM to rank 1", and do not wait for the background
save yet (1 of 2 parts is done). Nothing here comes from the device, so that nothing waits for it;
whether the step may be applied is agreed there (`step_judge`).
"""

from dataclasses import dataclass

import torch

from spectral_scale.parallel.collective import Collective
from spectral_scale.supervision.control_files import Manner, Request
from spectral_scale.supervision.signals import StopRequest

_MANNERS: tuple[Manner, ...] = ("requeue", "hold", "now")
_TIME, _LAUNCHER, _SAVE, _WRITTEN = range(len(_MANNERS), len(_MANNERS) + 4)
_FIXED = len(_MANNERS) + 4
"""Slots before those of the single ranks, of which each rank has two."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank has seen."""

    request: Request
    """What the control files ask for; only rank 0 reads them."""
    time_is_up: bool
    """Whether this rank's clock says to stop."""
    written: bool
    """Whether this rank's part of a checkpoint in the background is done."""
    work_seconds: float
    """What this rank did without the others: from asking for the batch to the last backward."""


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """What follows from all reports; the same on every rank."""

    stop: str | None
    """Why to stop after this step; None to go on."""
    manner: Manner
    """How to stop."""
    save: bool
    """Whether someone asked to save and go on."""
    written: bool
    """Whether every rank's part of the checkpoint in the background is done."""
    work_seconds: tuple[float, ...]
    """Each rank's seconds of work, by rank."""


def reach_consensus(collective: Collective, stop: StopRequest, report: RankReport) -> Consensus:
    """Exchange the reports of all ranks and draw the conclusions. Collective."""
    rank, world_size = collective.rank, collective.world_size
    slots = torch.zeros(_FIXED + 2 * world_size, dtype=torch.float64)
    if report.request.stop is not None:
        slots[_MANNERS.index(report.request.stop)] = 1
    slots[_TIME] = report.time_is_up
    slots[_LAUNCHER] = stop.launcher_gone()
    slots[_SAVE] = report.request.save
    slots[_WRITTEN] = report.written
    signals, work = (slots[_FIXED + i * world_size :][:world_size] for i in range(2))
    signals[rank] = stop.received_number
    work[rank] = report.work_seconds
    collective.all_reduce_sum(slots)
    reason, manner = _stop_reason(slots, signals, stop, rank)
    return Consensus(
        stop=reason,
        manner=manner,
        save=bool(slots[_SAVE]),
        written=int(slots[_WRITTEN]) == world_size,
        work_seconds=tuple(work.tolist()),
    )


def _stop_reason(
    slots: torch.Tensor, signals: torch.Tensor, stop: StopRequest, rank: int
) -> tuple[str | None, Manner]:
    """Why and how to stop; a file counts before a signal, since a person has written it."""
    for manner in reversed(_MANNERS):
        if slots[_MANNERS.index(manner)]:
            return "the file STOP", manner
    asked = signals.nonzero().flatten().tolist()
    if asked:
        name = stop.name_of(int(signals[asked[0]]))
        return (name if rank in asked else f"{name} to rank {asked[0]}"), "requeue"
    if slots[_TIME]:
        return "the end of its time", "requeue"
    return ("the end of its launcher", "requeue") if slots[_LAUNCHER] else (None, "requeue")
