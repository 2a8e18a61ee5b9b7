"""What may stop a run, leave out a step or end a hang: everything around the loop in one place."""

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from spectral_scale.supervision.consensus import Consensus, Mine, agree
from spectral_scale.supervision.control_files import ControlFiles, Request
from spectral_scale.supervision.health import HealthMonitor, Verdict
from spectral_scale.supervision.heartbeat import Phase, forget
from spectral_scale.supervision.signals import StopRequest
from spectral_scale.supervision.status import read_status
from spectral_scale.supervision.stragglers import Stragglers
from spectral_scale.supervision.time_limit import TimeLimit
from spectral_scale.supervision.watchdog import End, Watchdog

if TYPE_CHECKING:
    from spectral_scale.engine.build import Run
    from spectral_scale.engine.saver import Saver


class Supervisor:
    """One rank's signals, clock, files and heartbeat, and what all ranks made of them.

    Use as a context manager around the loop. `accept` or `agree` is called once a step, by all
    ranks.

    Args:
        run: to be guarded.
        saver: of the run.
        end: ends the process of a run that hangs.
    """

    def __init__(self, run: "Run", saver: "Saver", end: End) -> None:
        config, self._collective = run.config, run.backend.collective
        self._loss_weight = run.backend.data_world_size / self._collective.world_size
        """Ranks that share their data see the same loss."""
        self._run_dir, self._saver = Path(config.train.run_dir), saver
        self._ordinary_overflow = config.train.precision == "fp16"
        self._stack = ExitStack()
        self._stop = StopRequest(launched="RANK" in os.environ)
        self.switches = ControlFiles(self._run_dir)
        self._leads = self._collective.rank == 0
        self.time_limit = TimeLimit(
            config.train.time_limit_minutes,
            save_seconds=read_status(self._run_dir).get("save_seconds"),
        )
        self.watchdog = Watchdog(
            self._run_dir,
            rank=self._collective.rank,
            world_size=self._collective.world_size,
            timeout_seconds=config.health.hang_timeout_seconds,
            end=end,
        )
        self.monitor = HealthMonitor(config.health, run.saved_state.get("health"))
        self.stragglers = Stragglers(self.watchdog.host_of)
        self._work_started = time.perf_counter()
        self._work_seconds = 0.0
        self.agreed: Consensus
        """By all ranks in the latest step."""
        self.has_agreed = False
        """Whether that was this step."""
        self.verdict = Verdict()
        """On the latest step."""

    def __enter__(self) -> Self:
        if self._leads:
            forget(self._run_dir)
        self._collective.barrier()  # then every rank writes its heartbeat
        self._stack.enter_context(self._stop)
        self._stack.enter_context(self.watchdog)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def mark(self, step: int, phase: Phase) -> None:
        """This rank moves on; called often."""
        self.watchdog.mark(step, phase)
        if phase == "data":
            self._work_started = time.perf_counter()

    def worked(self, step: int) -> None:
        """This rank comes to where it exchanges gradients with the others."""
        self.mark(step, "backward")
        self._work_seconds = time.perf_counter() - self._work_started

    def begin_step(self) -> None:
        """Nothing has been agreed on yet."""
        self.has_agreed, self.verdict = False, Verdict()

    def accept(
        self, loss: Tensor, norms: Mapping[str, Tensor], *, entered: Callable[[], None]
    ) -> bool:
        """Whether the step may be applied, and all else there is to agree on. Collective.

        Args:
            loss: this rank's share of the mean loss, 0-dim.
            norms: of the averaged gradients, by group kind; the same on all ranks.
            entered: called when all ranks have agreed, before the update.
        """
        device = loss.device
        parts = [loss.detach().double(), *(norm.to(device).double() for norm in norms.values())]
        share, *found = torch.stack(parts).tolist()  # the one wait for the device in a step
        norm = math.sqrt(sum(value * value for value in found))
        faulty = not (self._ordinary_overflow or math.isfinite(norm))
        self.agreed = self._agree(share, norm, faulty)
        self.verdict = self.monitor.judge(
            loss=self.agreed.loss, norm=self.agreed.norm, faulty_ranks=self.agreed.faulty_ranks
        )
        entered()
        return self.verdict.healthy

    def agree(self) -> None:
        """The same without judging the step, and without waiting for the device. Collective."""
        self.agreed = self._agree(0.0, 0.0, faulty=False)

    def _agree(self, share: float, norm: float, faulty: bool) -> Consensus:
        mine = Mine(
            request=self.switches.read() if self._leads else Request(),
            time_is_up=self._leads and self.time_limit.reached(),
            written=self._saver.written,
            loss=share * self._loss_weight,
            norm=norm,
            faulty=faulty,
            work_seconds=self._work_seconds,
        )
        agreed = agree(self._collective, self._stop, mine)
        self.has_agreed = True
        self.stragglers.add(agreed.work_seconds)
        return agreed
