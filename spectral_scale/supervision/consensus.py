"""What all ranks must know before a step may be applied, in one small all-reduce on the host."""

import math
from dataclasses import dataclass

import torch

from spectral_scale.parallel.collective import Collective
from spectral_scale.supervision.control_files import Manner, Request
from spectral_scale.supervision.signals import StopRequest

_MANNERS: tuple[Manner, ...] = ("requeue", "hold", "now")
_TIME, _LAUNCHER, _SAVE, _WRITTEN, _LOSS, _NORM = range(len(_MANNERS), len(_MANNERS) + 6)
_FIXED = len(_MANNERS) + 6
"""Slots before those of the single ranks: a signal, a fault and seconds of work for each."""
_SHARED, _OWN = 1, 2
"""Faults: the gradient is not finite, or this rank's own loss is not."""


@dataclass(frozen=True, kw_only=True)
class Mine:
    """One rank's part."""

    request: Request
    """Of the files; only rank 0 reads them."""
    time_is_up: bool
    """Whether its clock says to stop."""
    written: bool
    """Whether its part of a checkpoint in the background is done."""
    loss: float
    """Its share of the step's mean loss."""
    norm: float
    """Norm of the whole gradient."""
    faulty: bool
    """Whether the gradient norms it knows are not finite."""
    work_seconds: float
    """From the call for the batch to the last backward pass: what it did without the others."""


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """The same on every rank."""

    stop: str | None
    """Why to stop after this step, if at all."""
    manner: Manner
    """How to stop."""
    save: bool
    """Whether someone asked to save and go on."""
    written: bool
    """Whether every rank's part of the checkpoint in the background is done."""
    loss: float
    """The step's mean loss; NaN if a rank found something not finite."""
    norm: float
    """Norm of the whole gradient, the mean of what ranks found: equal but for a fault."""
    faulty_ranks: tuple[int, ...]
    """Ranks whose own loss is not finite or, if there is none, those that saw such a gradient."""
    work_seconds: tuple[float, ...]
    """By rank."""


def agree(collective: Collective, stop: StopRequest, mine: Mine) -> Consensus:
    """Exchange every rank's part. Collective."""
    rank, world_size = collective.rank, collective.world_size
    slots = torch.zeros(_FIXED + 3 * world_size, dtype=torch.float64)
    if mine.request.stop is not None:
        slots[_MANNERS.index(mine.request.stop)] = 1
    slots[_TIME] = mine.time_is_up
    slots[_LAUNCHER] = stop.launcher_gone()
    slots[_SAVE] = mine.request.save
    slots[_WRITTEN] = mine.written
    slots[_LOSS] = mine.loss if math.isfinite(mine.loss) else 0.0
    slots[_NORM] = mine.norm / world_size if math.isfinite(mine.norm) else 0.0
    signals, faults, work = (slots[_FIXED + i * world_size :][:world_size] for i in range(3))
    signals[rank] = stop.received_number
    faults[rank] = _OWN if not math.isfinite(mine.loss) else _SHARED if mine.faulty else 0
    work[rank] = mine.work_seconds
    collective.all_reduce_sum(slots)
    # A gradient is shared: the ranks whose own loss is bad are the ones to look at.
    faulty = tuple((faults == faults.max()).nonzero().flatten().tolist()) if faults.any() else ()
    reason, manner = _stop_reason(slots, signals, stop, rank)
    return Consensus(
        stop=reason,
        manner=manner,
        save=bool(slots[_SAVE]),
        written=int(slots[_WRITTEN]) == world_size,
        loss=math.nan if faulty else float(slots[_LOSS]),
        norm=float(slots[_NORM]),
        faulty_ranks=faulty,
        work_seconds=tuple(work.tolist()),
    )


def _stop_reason(
    slots: torch.Tensor, signals: torch.Tensor, stop: StopRequest, rank: int
) -> tuple[str | None, Manner]:
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
