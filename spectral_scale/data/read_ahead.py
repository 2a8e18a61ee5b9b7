"""Processes that read micro-batches ahead and hand them over through plain pipes.

A batch travels as bytes through the pipe of its worker. No socket in TMPDIR, no shared memory and
no file handle besides that pipe takes part, so that none of these can be what a worker lacks.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import psutil

from spectral_scale.config.stop_signals import STOP_SIGNALS
from spectral_scale.errors import DataError, WorkerError

logger = logging.getLogger(__name__)

Read = Callable[[int], Any]
"""The number of a micro-batch -> its arrays."""
WhileWaiting = Callable[[float], bool]
"""Called about once a second with the seconds waited so far; True gives the wait up."""
POLL_SECONDS = 1.0
WARN_SECONDS = 20.0
"""A wait this long is said, and again whenever it has doubled."""
_PARENT_SECONDS = 1.0
_KILLED_SECONDS = 5.0
"""How long a killed worker may take to be gone; one that hangs in the kernel is left behind."""
_PR_SET_PDEATHSIG = 1


class ReadAhead:
    """Reads items in order with several processes; worker w takes every N-th one from the w-th.

    Each worker reads until its pipe is full. Use as a context manager: on leaving it ends the
    workers at once, whatever they are doing.

    Args:
        read: runs in the workers, which are forks of this process.
        numbers: the items to read, in order.
        num_workers: N.

    Raises:
        WorkerError: a worker cannot be started.
    """

    def __init__(self, read: Read, numbers: Sequence[int], num_workers: int) -> None:
        self._read, self._numbers = read, numbers
        self._num_workers = min(num_workers, len(numbers))
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Self:
        try:
            for place in range(self._num_workers):
                self._workers.append(self._start(place))
        except OSError as error:
            self.close()
            raise WorkerError(
                f"loader process {len(self._workers) + 1} of {self._num_workers} cannot be started "
                f"({error.strerror or error}); lower data.num_workers, or raise the limits on open "
                "files (ulimit -n) and processes (ulimit -u)"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def items(self, while_waiting: WhileWaiting | None = None) -> Iterator[Any]:
        """Yield the results of `read` in order; stop early if `while_waiting` asks for it.

        Raises:
            DataError: a worker's own, with its message.
            WorkerError: a worker died or failed in another way.
        """
        for place in range(len(self._numbers)):
            process, pipe = self._workers[place % self._num_workers]
            if not _arrives(process, pipe, while_waiting):
                return
            yield _receive(process, pipe)

    def close(self) -> None:
        """End the workers. SIGKILL also ends those that are stopped; they hold no state."""
        for process, _ in self._workers:
            process.kill()
        for process, pipe in self._workers:
            process.join(_KILLED_SECONDS)
            pipe.close()
        self._workers = []

    def _start(self, place: int) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        numbers = self._numbers[place :: self._num_workers]
        process = context.Process(
            target=_work, args=(self._read, numbers, theirs, os.getpid()), daemon=True
        )
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return process, ours


def _arrives(process: BaseProcess, pipe: Connection, while_waiting: WhileWaiting | None) -> bool:
    """Wait for a message or the end of the worker; False if the wait was given up."""
    started, warn_at = time.monotonic(), WARN_SECONDS
    while not connection.wait([pipe, process.sentinel], POLL_SECONDS):
        waited = time.monotonic() - started
        if while_waiting is not None and while_waiting(waited):
            return False
        if waited >= warn_at:
            warn_at *= 2
            logger.warning(
                "no training data for %.0f s: loader process %s is %s; look at the file system of "
                "data.train",
                waited,
                process.pid,
                _state(process),
            )
    return True


def _receive(process: BaseProcess, pipe: Connection) -> Any:
    try:
        kind, content = pipe.recv()
    except (EOFError, OSError):
        process.join(POLL_SECONDS)
        raise WorkerError(_death(process)) from None
    if kind == "data":
        raise DataError(content)
    if kind == "failure":
        raise WorkerError(f"loader process {process.pid} failed:\n{content}")
    return content


def _death(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        how = f"ended by itself (exit code {code})"
    else:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", which is what the kernel does when memory runs out"
    return (
        f"loader process {process.pid} {how}; start again to continue from the last checkpoint, "
        "with a lower data.num_workers if memory is short"
    )


def _state(process: BaseProcess) -> str:
    """The state of a worker as the system names it: sleeping, disk-sleep, stopped, ..."""
    try:
        return str(psutil.Process(process.pid).status())
    except psutil.Error:
        return "gone"


def _work(read: Read, numbers: Sequence[int], pipe: Connection, parent: int) -> None:
    """Body of a worker: read and send, until all is sent or the parent is gone."""
    # The main process decides, though the whole group is signalled.
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)
    _die_with_parent()
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    message: tuple[str, Any]
    for number in numbers:
        try:
            message = ("item", read(number))
        except DataError as error:
            message = ("data", str(error))
        except BaseException:
            message = ("failure", traceback.format_exc())
        try:
            pipe.send(message)
        except OSError:  # nobody reads any more
            return
        if message[0] != "item":
            return


def _die_with_parent() -> None:
    """Let the kernel end this worker when its parent dies, even one that is suspended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _exit_with_parent(parent: int) -> None:
    """End this worker when `parent` has died and the kernel does not, or was asked too late."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)
