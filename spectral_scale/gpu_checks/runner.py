"""Runs the checks one after another, each in a process that cannot take the others with it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectral_scale.errors import ConfigError
from spectral_scale.gpu_checks.catalogue import Check
from spectral_scale.gpu_checks.findings import Result
from spectral_scale.gpu_checks.one import REHEARSAL
from spectral_scale.gpu_checks.page import to_markdown
from spectral_scale.gpu_checks.place import Place, facts

CHECK_SECONDS = 480.0
"""Time for one check; its process is ended then."""
TOTAL_SECONDS = 1200.0
"""Time for all; checks that have not begun by then wait for `--resume`."""
LEAST_SECONDS = 20.0
"""Shortest time left in which a check is still begun."""
TAIL_CHARACTERS = 3000
PAGE = "gpu_checks.md"

Notify = Callable[[Result], None]


@dataclass(frozen=True, kw_only=True)
class Session:
    """Where the results of a machine are kept, and how much time there is."""

    place: Place
    """The machine; its folder holds everything that the command writes."""
    check_seconds: float = CHECK_SECONDS
    total_seconds: float = TOTAL_SECONDS

    def result_file(self, name: str) -> Path:
        """Where a check's result is kept."""
        return self.place.folder / "results" / f"{name}.json"

    def log_file(self, name: str) -> Path:
        """Where a check's process prints."""
        return self.place.folder / "logs" / f"{name}.txt"


def run_checks(
    session: Session, checks: Sequence[Check], *, resume: bool, notify: Notify = lambda _: None
) -> list[Result]:
    """Run checks in turn and write the page after each, so that nothing is lost with this process.

    Args:
        session: the machine and its folder.
        checks: in the order in which they run.
        resume: keep the results of earlier runs that passed, or were skipped, with the same
            versions and devices.
        notify: told each result as it is there.

    Raises:
        ConfigError: the folder cannot be written.
    """
    _make_folders(session.place.folder)
    own, results = facts(session.place), []
    deadline = time.monotonic() + session.total_seconds
    for check in checks:
        kept = kept_result(session, check, own) if resume else None
        result = kept or _run_in_time(session, check, deadline)
        results.append(result)
        notify(result)
        write_page(session, checks, results, own)
    return results


def _make_folders(folder: Path) -> None:
    try:
        for name in ("results", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {folder} cannot be written ({error.strerror}); give a folder that can be"
        ) from None


def kept_result(session: Session, check: Check, own: Mapping[str, str]) -> Result | None:
    """The result of an earlier run, if it stands: passed or skipped, with the same facts."""
    try:
        text = session.result_file(check.name).read_text(encoding="utf-8")
        result = Result.from_json(json.loads(text))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    stands = result.verdict in ("pass", "skip") and dict(result.facts) == dict(own)
    return result if stands else None


def _run_in_time(session: Session, check: Check, deadline: float) -> Result:
    left = deadline - time.monotonic()
    if left < LEAST_SECONDS:
        reason = f"the {session.total_seconds / 60:g} minutes were over; go on with --resume"
        return Result(name=check.name, verdict="not run", reason=reason)
    return run_check(session, check, seconds=min(session.check_seconds, left))


def run_check(session: Session, check: Check, *, seconds: float) -> Result:
    """Run one check in a process of its own, and end it when its time is over."""
    file, log = session.result_file(check.name), session.log_file(check.name)
    _make_folders(session.place.folder)
    file.unlink(missing_ok=True)
    scratch = session.place.folder / "scratch" / check.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    words = [check.name, str(scratch), str(file)]
    words += [REHEARSAL] if session.place.rehearsal else []
    started = time.monotonic()
    with log.open("wb") as output:
        code = _run(["spectral_scale.gpu_checks.one", *words], output.fileno(), seconds)
    took = time.monotonic() - started
    result = _read(file) or _without_result(check, code, log, seconds)
    if result.verdict in ("pass", "skip"):
        shutil.rmtree(scratch, ignore_errors=True)
    result = replace(result, seconds=took)
    file.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    return result


def _run(words: Sequence[str], output: int, seconds: float) -> int | None:
    """The exit code of a process and everything it starts; None if its time was over."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Its ranks, too: they are in its group, and a GPU that they hold is missing for the rest.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _read(file: Path) -> Result | None:
    try:
        return Result.from_json(json.loads(file.read_text(encoding="utf-8")))
    except OSError:
        return None


def _without_result(check: Check, code: int | None, log: Path, seconds: float) -> Result:
    """The failure of a process that left no result."""
    tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:].strip()
    reason = f"its process ended with exit code {code} and left no result"
    if code is None:
        reason = f"it was not done after {seconds:.0f} s and was ended"
    text = f"The end of what it printed:\n\n```\n{tail or '(nothing)'}\n```"
    return Result(name=check.name, verdict="fail", reason=reason, text=text)


def write_page(
    session: Session, checks: Sequence[Check], results: Sequence[Result], own: Mapping[str, str]
) -> Path:
    """Write the page, with what is known so far."""
    done = {result.name: result for result in results}
    waiting = (Result(name=c.name, verdict="not run", reason="not yet") for c in checks)
    every = [done.get(result.name, result) for result in waiting]
    path = session.place.folder / PAGE
    text = to_markdown(checks, every, own, rehearsal=session.place.rehearsal)
    path.write_text(text, encoding="utf-8")
    return path


def exit_code(results: Sequence[Result]) -> int:
    """0 if every check passed or was skipped, else 1."""
    return int(any(result.verdict in ("fail", "not run") for result in results))
