"""Runs trials with the real `spectral-scale train`, one process each, and writes their results."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO

from study.collect import check_run_folder, collect, diverged
from study.plan import all_trials
from study.results import Result, StudyError, read_results, require_same_data, write_result
from study.trial import Plan, Trial

RESUMABLE = 75
POLL_SECONDS = 0.2
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # glibc gives large tensors back to the system after each step, and the next step's page faults
    # were a quarter of its CPU time. Other allocators ignore these.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Of every run, over this process's own."""

Command = Callable[[Trial, Path], list[str]]
"""The command line that trains a trial in a run folder, or resumes it there."""


def train_command(data: Path) -> Command:
    """`spectral-scale train` on the token folders `train` and `valid` of `data`."""

    def command(trial: Trial, run_dir: Path) -> list[str]:
        values = dict(trial.settings or {}) | {
            "data.train": data / "train",
            "data.validation": data / "valid",
            "train.run_dir": run_dir,
        }
        overrides = [f"--{key}={_word(value)}" for key, value in values.items()]
        return [sys.executable, "-m", "spectral_scale", "train", *overrides]

    return command


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(kw_only=True)
class Executor:
    """Runs what is left of the study until it is complete, stopped, or nothing can be started."""

    results: Path
    """Folder of the results."""
    runs: Path
    """Folder of the run folders; a killed run continues from its own."""
    command: Command
    """How a trial is run."""
    plan: Plan = all_trials
    """The runs of the study."""
    wanted: Callable[[Trial], bool] = lambda _: True
    """Which trials to run."""
    workers: int = 1
    """Processes at a time, one thread each."""
    say: Callable[[str], None] = print
    """Where progress goes."""
    failed: list[str] = field(default_factory=list)
    """Trials whose run failed in this call, not by divergence; they are not tried again."""
    _running: dict[str, tuple[Trial, subprocess.Popen[bytes]]] = field(default_factory=dict)
    _stopped: bool = False

    def run(self) -> int:
        """0: nothing is left; 75: stopped, the same call continues; 1: a run failed.

        Raises StudyError for a result or a run folder made with other settings or data.
        """
        with self._stop_on_signal():
            try:
                while self._start_what_can() or self._running:
                    time.sleep(POLL_SECONDS)
                    self._finish_what_ended()
            except BaseException:
                self._stop_all()
                raise
            finally:
                self._wait_for_all()
        if self._stopped:
            return RESUMABLE
        return 1 if self.failed else 0

    def _start_what_can(self) -> bool:
        """Fill the free places; whether anything was started."""
        started = False
        while not self._stopped and len(self._running) < self.workers:
            trial = self._next()
            if trial is None:
                break
            self._start(trial)
            started = True
        return started

    def _next(self) -> Trial | None:
        results = read_results(self.results)
        require_same_data(results)
        taken = set(results) | set(self._running) | set(self.failed)
        left = (trial for trial in self.plan(results) if trial.name not in taken)
        ready = (trial for trial in left if trial.settings is not None and self.wanted(trial))
        return next(ready, None)

    def _start(self, trial: Trial) -> None:
        run_dir = self.runs / trial.name
        check_run_folder(trial, run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with (self.runs / f"{trial.name}.log").open("a") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then asks the runs.
            process = _spawn(self.command(trial, run_dir), log)
        self._running[trial.name] = trial, process
        self.say(f"{_clock()} start {trial.name}")

    def _finish_what_ended(self) -> None:
        for name, (trial, process) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            self._finish(trial, code)

    def _finish(self, trial: Trial, code: int) -> None:
        run_dir = self.runs / trial.name
        if code == RESUMABLE:
            self.say(f"{_clock()} stopped {trial.name}; it continues next time")
        elif code == 0 or diverged(run_dir):
            result = collect(trial, run_dir, diverged=code != 0)
            write_result(self.results, result)
            self.say(f"{_clock()} done  {trial.name}: {_outcome(result)}")
        elif not self._stopped:
            self.failed.append(trial.name)
            log = self.runs / f"{trial.name}.log"
            self.say(f"{_clock()} FAILED {trial.name} (exit code {code}); see {log}")

    def _stop_all(self) -> None:
        self._stopped = True
        for _, process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def _wait_for_all(self) -> None:
        for name, (trial, process) in list(self._running.items()):
            code = process.wait()
            del self._running[name]
            with contextlib.suppress(StudyError):  # another error is already on its way
                self._finish(trial, code)

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Hand SIGTERM and Ctrl-C on to the runs as SIGTERM; they save and end."""

        def receive(number: int, frame: FrameType | None) -> None:
            self.say(f"{_clock()} stopping: the runs save and end")
            self._stop_all()

        previous = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _spawn(command: list[str], log: TextIO) -> subprocess.Popen[bytes]:
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, start_new_session=True
    )


def _outcome(result: Result) -> str:
    if result.diverged:
        return "diverged"
    return f"validation loss {result.loss:.4f} in {result.facts.get('train_seconds', 0):.0f} s"


def _clock() -> str:
    return time.strftime("%H:%M:%S")
