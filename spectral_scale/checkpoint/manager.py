"""The checkpoints of one run: which is the newest good one, saving the next, removing the oldest.

All methods are collective. Rank 0 decides what exists and what is removed; whether a checkpoint
is good is agreed, so that no rank loads what another rank could not.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spectral_scale.checkpoint.format import FileOpener, create_file
from spectral_scale.checkpoint.manifest import manifest_sha256
from spectral_scale.checkpoint.names import (
    list_checkpoints,
    remove_checkpoint,
    remove_leftovers,
    step_of,
)
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.checkpoint.writer import save_checkpoint
from spectral_scale.errors import CheckpointError, ConfigError
from spectral_scale.parallel.chunks import TensorChunk
from spectral_scale.parallel.collective import Collective

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Keeps the checkpoints in `root`. Creating one changes nothing on disk.

    `save` needs the run's lock (rank 0 holds a RunLock); `latest_good` only reads.

    Retention: a checkpoint is removed only when `keep_last` newer ones have been verified by this
    process, by reading them back before their commit or by hashing them in `latest_good`. So a
    damaged newer folder never counts, and the newest verified checkpoint always stays. Those of
    steps that are multiples of `keep_every` stay for good.
    """

    def __init__(
        self,
        root: str | Path,
        keep_last: int,
        collective: Collective,
        *,
        keep_every: int | None = None,
        open_new: FileOpener = create_file,
    ) -> None:
        if keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last is {keep_last}; it must be at least 1")
        if keep_every is not None and keep_every < 1:
            raise ConfigError(f"checkpoint.keep_every is {keep_every}; it must be at least 1")
        self.root = Path(root)
        self.keep_last, self.keep_every = keep_last, keep_every
        self._collective = collective
        self._open_new = open_new
        self._verified: set[int] = set()
        self._cleaned = False

    def latest_good(
        self, wanted: Callable[[int], bool] = lambda step: True
    ) -> CheckpointReader | None:
        """Open the newest checkpoint whose every byte is as written; None if there is none at all.

        Only those of steps that are `wanted` are looked at.

        A bad one is named with its fault in a WARNING and left as it is, and the one before it is
        tried. Raises CheckpointError if there are checkpoints but none is good: starting again
        from step 0 is for the user to decide.
        """
        faults = []
        for name in self._names():
            if not wanted(_step_in(name)):
                continue
            reader, fault = self._open(self.root / name)
            if fault is None and reader is not None:
                self._verified.add(reader.step)
                return reader
            faults.append(f"{name}: {fault}")
            if self._collective.rank == 0:
                logger.warning("checkpoint %s is not usable and is passed over: %s", name, fault)
        if faults:
            listing = "\n  ".join(faults)
            raise CheckpointError(
                f"none of the {len(faults)} checkpoints in {self.root} is usable:\n  {listing}\n"
                "restore one of them, or move the folder away to start from step 0"
            )
        return None

    def save(
        self,
        step: int,
        chunks: Iterable[TensorChunk],
        *,
        state: Mapping[str, Any],
        identity: Mapping[str, Any],
    ) -> Path:
        """Write, read back and commit a checkpoint, then remove those no longer kept.

        As `save_checkpoint`, and raises CheckpointError on every rank as it does. What cannot be
        removed is only reported.
        """
        self._clean_once()
        path = save_checkpoint(
            self.root,
            step,
            chunks,
            state=state,
            identity=identity,
            collective=self._collective,
            open_new=self._open_new,
        )
        self._verified.add(step)
        if self._collective.rank == 0:
            self._prune()
        return path

    def _names(self) -> list[str]:
        """Names of the checkpoints that rank 0 sees, newest first; the same on every rank."""
        names, fault = [], None
        if self._collective.rank == 0:
            try:
                names = [path.name for path in list_checkpoints(self.root)]
            except OSError as error:
                fault = str(error)
        failure = self._collective.agree(fault, what="list checkpoints")
        if failure is not None:
            raise CheckpointError(f"{self.root} cannot be read: {failure}")
        return list(self._collective.broadcast_json(names))

    def _open(self, path: Path) -> tuple[CheckpointReader | None, str | None]:
        """Open on all ranks, hashing a share of the files on each, and agree on the result."""
        reader, fault = None, None
        try:
            reader = CheckpointReader.open(path, verify=False)
        except Exception as error:  # whatever it is, all ranks must agree on it
            fault = str(error)
        mine = None if reader is None else manifest_sha256(reader.manifest)
        if self._collective.broadcast_json(mine) != mine:
            fault = fault or "this rank reads another manifest than rank 0; is the folder shared?"
        if reader is not None and fault is None:
            fault = self._verify_share(reader)
        return reader, self._collective.agree(fault, what="open checkpoint")

    def _verify_share(self, reader: CheckpointReader) -> str | None:
        rank, world_size = self._collective.rank, self._collective.world_size
        try:
            reader.verify(sorted(reader.manifest.files)[rank::world_size])
        except Exception as error:
            return str(error)
        return None

    def _clean_once(self) -> None:
        if self._cleaned or self._collective.rank != 0:
            return
        self._cleaned = True
        try:
            for name in remove_leftovers(self.root):
                logger.info("removed %s, left by a save that did not finish", name)
        except OSError as error:
            logger.warning("leftovers in %s could not be removed: %s", self.root, error)

    def _prune(self) -> None:
        newer_verified = 0
        for path in list_checkpoints(self.root):
            step = step_of(path.name)
            if newer_verified >= self.keep_last and step is not None and not self._milestone(step):
                try:
                    remove_checkpoint(path)
                except OSError as error:
                    logger.warning("old checkpoint %s could not be removed: %s", path, error)
            newer_verified += step in self._verified

    def _milestone(self, step: int) -> bool:
        return self.keep_every is not None and step % self.keep_every == 0


def _step_in(name: str) -> int:
    """Step of a checkpoint folder, also of one that was moved aside."""
    return step_of(name.removeprefix(".replaced_")) or 0
