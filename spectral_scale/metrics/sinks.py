"""Sinks of measurements: `metrics.jsonl` and TensorBoard. A failing sink never stops a run."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_FLUSH_SECONDS = 10

Value = float | int | str | Sequence[Any] | Mapping[str, Any]


class NullLog:
    """The log of every rank but 0: takes everything, writes nothing."""

    failures = 0

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Do nothing."""

    def go_back(self, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class MetricsLog:
    """Rank 0's log: one JSON object a line in `metrics.jsonl`, and tensorboard events.

    Nothing here raises: what a sink loses is counted in `failures` and its first failure is
    logged as one warning. Files are touched at the first `write`.

    The first line of every attempt (a process's life) carries `event: "start"`, or
    `event: "resume"` at `resume_step`; the values of a first `write` at that step join it. That
    line tells readers which earlier lines it supersedes: all of them at a start, those with a
    larger step at a resume. The file itself is only ever appended to.

    Args:
        run_dir: the run folder.
        tensorboard: also write events under `run_dir/tensorboard`.
        resume_step: the step of the checkpoint this attempt continues from; None: from scratch.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, resume_step: int | None = None) -> None:
        self.failures = 0
        self._warned: set[str] = set()
        self._run_dir, self._tensorboard = run_dir, tensorboard
        self._open(resume_step, "start" if resume_step is None else "resume")

    def _open(self, resume_step: int | None, event: str) -> None:
        lines = _LinesSink(self._run_dir / METRICS_FILE, resume_step or 0, event)
        self._sinks: list[_Sink] = [lines]
        if self._tensorboard:
            self._sinks.append(_TensorboardSink(self._run_dir / TENSORBOARD_FOLDER, resume_step))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line of `values` at `step`, flushed; never raises.

        Numbers also become tensorboard scalars, and lists of numbers tensorboard histograms. NaN
        and infinities are written as the strings "NaN", "Infinity" and "-Infinity", which
        `read_metrics` turns back. `step` and `time` are the log's own.
        """
        for sink in self._sinks:
            with self._guarded(sink.name):
                sink.write(step, to_plain(values))

    def go_back(self, step: int) -> None:
        """The run returned to an earlier step: what follows supersedes lines of later steps."""
        self.close()
        self._open(step, "rollback")

    def close(self) -> None:
        """Flush and close every sink; never raises. Closing twice is allowed."""
        for sink in self._sinks:
            with self._guarded(sink.name):
                sink.close()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any failure of a sink, whatever its kind, costs only the sink
            self.failures += 1
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "metrics: %s cannot be written (%s: %s); the run goes on, further failures "
                    "are only counted",
                    name,
                    type(error).__name__,
                    error,
                )


def to_plain(value: Any) -> Any:
    """`value` as JSON types: non-finite floats as strings, tensors as numbers or lists."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _float_to_json(float(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # torch and numpy: a number for a scalar, else nested lists
        return to_plain(value.tolist())
    return str(value)


def from_plain(value: Any) -> Any:
    """Inverse of `to_plain` on what it writes for floats: the three strings become floats."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _float_to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class _Sink(Protocol):
    """One destination; may raise anything."""

    name: str

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _LinesSink:
    """Appends whole lines with one unbuffered write each; tries again after a failure."""

    def __init__(self, path: Path, step: int, event: str) -> None:
        self.name = path.name
        self._path = path
        self._fd: int | None = None
        self._opening: dict[str, Any] | None = {"step": step, "event": event}

    def write(self, step: int, values: dict[str, Any]) -> None:
        now = round(time.time(), 3)
        line = values | {"step": step, "time": now}
        lines = [line]
        if self._opening is not None:
            if step == self._opening["step"]:
                line["event"] = self._opening["event"]
            else:
                lines.insert(0, self._opening | {"time": now})
        self._append("".join(_encode(each) for each in lines).encode())
        self._opening = None

    def close(self) -> None:
        if self._fd is not None:
            descriptor, self._fd = self._fd, None
            os.close(descriptor)

    def _append(self, data: bytes) -> None:
        if self._fd is None:
            self._fd = self._open()
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes were written")
        except OSError:
            self.close()  # opening again ends a line that was cut
            raise

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.write(descriptor, b"\n")
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def _encode(line: dict[str, Any]) -> str:
    first = {key: line[key] for key in ("step", "time", "event") if key in line}
    return json.dumps(first | line, allow_nan=False) + "\n"


class _TensorboardSink:
    """Tensorboard events; given up at the first failure, since its writer does not recover."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        self.name = "tensorboard"
        self._folder = folder
        self._purge_step = 0 if resume_step is None else resume_step + 1
        self._writer: Any = None
        self._given_up = False

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self._given_up:
            raise OSError("given up after an earlier failure")
        try:
            self._write(step, values)
        except Exception:
            self._given_up = True
            raise

    def close(self) -> None:
        if self._writer is not None and not self._given_up:
            self._writer.close()
        self._writer = None

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = self._open()
        for key, value in values.items():
            if isinstance(number := from_plain(value), (int, float)) and not isinstance(
                value, bool
            ):
                self._writer.add_scalar(key, number, step)
            elif isinstance(value, list):
                finite = [item for item in value if isinstance(item, (int, float))]
                if finite:
                    self._writer.add_histogram(key, np.asarray(finite), step)

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # slow, and may be absent

        return SummaryWriter(
            str(self._folder),
            purge_step=self._purge_step,
            flush_secs=TENSORBOARD_FLUSH_SECONDS,
        )
