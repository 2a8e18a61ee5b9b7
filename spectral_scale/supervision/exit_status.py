"""How a run begins and ends as schedulers see it: counted starts, exit codes, status.json."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from spectral_scale.errors import ConfigError, LostRankError, NoProgressError, SpectralScaleError
from spectral_scale.supervision.control_files import ControlFiles
from spectral_scale.supervision.restart_limit import RestartLimit
from spectral_scale.supervision.run_folder import write_failure
from spectral_scale.supervision.status import EXIT_CODES, read_status, saved_step

logger = logging.getLogger(__name__)

DEPUTY_RANK = 1
"""This rank writes how a run failed if rank 0 is the one that was lost."""
DEPUTY_SECONDS = 2.0
"""The deputy writes unless rank 0 has done so within this time."""


class ExitStatus:
    """Writes how this start of a run began and ended; rank 0 does, unless it is lost.

    Args:
        run_dir: the run folder.
        rank: this process.
        steps: the steps of the whole run.
        max_starts: `train.max_starts_without_progress`.
    """

    def __init__(self, run_dir: Path, *, rank: int, steps: int, max_starts: int) -> None:
        self._run_dir, self._rank, self._steps = run_dir, rank, steps
        self._start_step = saved_step(run_dir)
        self._restart_limit = (
            RestartLimit(run_dir, steps=steps, limit=max_starts) if rank == 0 else None
        )

    def begin(self) -> None:
        """Count this start under the run's lock, before anything costly. Raises NoProgressError.

        Control files of an earlier start are removed, whether this one is fresh or resumes.
        """
        if self._restart_limit is not None:
            self._restart_limit.open()
            ControlFiles(self._run_dir).clear()

    def failed(self, error: BaseException) -> BaseException:
        """Note an error in status.json. Returns the error to raise in its place, or itself."""
        if isinstance(error, LostRankError):
            error.exit_code = self._code_of_lost_rank()
        reason = f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, SpectralScaleError) else EXIT_CODES["failed"]
        if isinstance(error, LostRankError):
            self._note_for_rank_0(reason, code)
        if self._restart_limit is None or isinstance(error, NoProgressError):
            return error
        if isinstance(error, ConfigError):  # nothing began
            self._restart_limit.withdraw()
            return error
        return self._note(reason, code) or error

    def at_once(self, verdict: str, end_hanging: Callable[[], None]) -> NoReturn:
        """End this process from another thread than the main one, which may wait for ever.

        status.json is written before hanging ranks are ended: their launcher may then end all.
        """
        code = self._code_of_lost_rank()
        reason = f"LostRankError: {verdict}"
        self._note_for_rank_0(reason, code)
        if self._restart_limit is not None:
            gave_up = self._note(reason, code)
            code = code if gave_up is None else gave_up.exit_code
        sys.stderr.write(f"spectral-scale train: error: {verdict}\n")
        sys.stderr.flush()
        end_hanging()
        logging.shutdown()
        os._exit(code)

    def _note(self, reason: str, code: int) -> NoProgressError | None:
        if self._restart_limit is None or (gave_up := self._restart_limit.failed(reason)) is None:
            write_failure(self._run_dir, steps=self._steps, reason=reason, exit_code=code)
            return None
        return gave_up

    def _note_for_rank_0(self, reason: str, code: int) -> None:
        if self._rank != DEPUTY_RANK:
            return
        time.sleep(DEPUTY_SECONDS)
        if read_status(self._run_dir).get("state") == "running":
            write_failure(self._run_dir, steps=self._steps, reason=reason, exit_code=code)

    def _code_of_lost_rank(self) -> int:
        """A start that lost a rank is worth a requeue if it saved something."""
        progressed = saved_step(self._run_dir) > self._start_step
        return EXIT_CODES["stopped" if progressed else "failed"]
