"""Whether a step may be applied, found on the device by all ranks, and read by the host later.

A host that asked for loss and norms before each update would let the GPU run dry. So the device
itself decides: every rank contributes to one small all-reduce, compares the sums with limits that
the host has computed from earlier steps, and gets a flag that the update obeys. The host reads the
same sums a step late, comes to the same verdict by its own rules (`HealthMonitor.judge`), and would
notice if the two ever differed.

With two ranks the tensor has 4 numbers of float64. Say the part of the mean loss is 2.0 on rank 0
but infinite on rank 1, so that the gradient of both is not finite:

    number   meaning                                           rank 0   rank 1      sum
    0        part of the mean loss, 0 if it is not finite         2.0      0.0      2.0
    1        gradient norm / world size, likewise                 0.0      0.0      0.0
    2 3      fault found, a number for each rank                  1 0      0 2      1 2

All ranks leave the step out because of rank 1, whose fault is the graver one. A value that is not
finite never enters the sum, since it would hide those of other ranks: the fault stands for it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.late_read import LateRead

_BAD_GRADIENT, _BAD_LOSS = 1.0, 2.0
"""Faults: the gradient of all ranks is not finite, or this rank's own loss is not."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What all ranks found of a step, the same on every rank."""

    loss: float
    """The mean loss; NaN if a rank found something not finite."""
    norm: float
    """The norm of the whole gradient: the mean of what ranks found, which is equal on all."""
    faulty_ranks: tuple[int, ...]
    """Ranks whose own loss is not finite or, without one, ranks that saw such a gradient."""
    left_out: bool
    """What the device did with the step."""


class JudgedStep:
    """A step on which the device has come to a verdict."""

    def __init__(self, slots: Tensor, left_out: Tensor) -> None:
        self.left_out = left_out.float()
        """1 if the step must be left out, else 0; float32, 0-dim, on the device."""
        self._numbers = LateRead(torch.cat([slots, left_out.double().view(1)]))

    def read(self) -> Findings:
        """The findings; waits until the device has judged the step."""
        loss, norm, *faults, left_out = self._numbers.read()
        # One bad loss spoils the gradient on all ranks: only the highest fault is to blame.
        worst = max(faults)
        faulty = tuple(rank for rank, fault in enumerate(faults) if worst and fault == worst)
        return Findings(
            loss=math.nan if faulty else loss,
            norm=norm,
            faulty_ranks=faulty,
            left_out=bool(left_out),
        )


class StepJudge:
    """Judges steps on the device.

    Args:
        collective: all ranks of the run.
        loss_weight: what a rank's loss counts for; ranks that see the same data count in part.
        overflow_is_ordinary: whether a gradient that is not finite is no fault (fp16).
    """

    def __init__(
        self, collective: Collective, *, loss_weight: float, overflow_is_ordinary: bool
    ) -> None:
        self._collective, self._loss_weight = collective, loss_weight
        self._faults = (_BAD_LOSS, 0.0 if overflow_is_ordinary else _BAD_GRADIENT)
        self._constants: tuple[Tensor, Tensor, Tensor] | None = None

    def judge(
        self, loss: Tensor, norms: Mapping[str, Tensor], limits: tuple[float, float]
    ) -> JudgedStep:
        """Compare with all ranks. Collective; nothing waits for the device.

        Args:
            loss: this rank's part of the mean loss, 0-dim.
            norms: of the averaged gradients, by group kind, 0-dim; the same on all ranks.
            limits: the largest loss and norm that are no spikes; infinite where none is known.
        """
        device = loss.device
        scales, faults, place = self._made(device)
        squares = torch.stack([norm.to(device, torch.float64) for norm in norms.values()]).square()
        found = torch.stack([loss.detach().double(), squares.sum().sqrt()]) * scales
        fault = (found.isfinite().logical_not() * faults).amax()
        slots = torch.cat([found.nan_to_num(0.0, 0.0, 0.0), place * fault])
        self._collective.all_reduce_sum(slots)
        bad = slots[2:].amax() > 0
        if any(map(math.isfinite, limits)):
            bad = bad | (slots[:2] > _on_device(limits, device)).any()
        return JudgedStep(slots, bad)

    def _made(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of loss and norm, the faults of either, and a 1 at this rank's place."""
        if self._constants is None:
            rank, world_size = self._collective.rank, self._collective.world_size
            place = torch.zeros(world_size, dtype=torch.float64)
            place[rank] = 1.0
            scales = torch.tensor([self._loss_weight, 1 / world_size], dtype=torch.float64)
            faults = torch.tensor(self._faults, dtype=torch.float64)
            self._constants = scales.to(device), faults.to(device), place.to(device)
        return self._constants


def _on_device(limits: tuple[float, float], device: torch.device) -> Tensor:
    """Two numbers of the host; from pinned memory, so that the host does not wait."""
    on_host = torch.tensor(limits, dtype=torch.float64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
