"""Writing a checkpoint: all ranks write, rank 0 commits, and either all succeed or all raise.

Order: plan and check -> every rank writes and hashes its files -> they are read back and held
against those hashes -> manifest -> one rename. So a folder with a checkpoint's name was complete
and verified on disk, and whatever fails before the rename leaves older checkpoints untouched.
"""

import errno
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from spectral_scale import __version__
from spectral_scale.checkpoint.format import FileOpener, create_file, write_bytes, write_chunks
from spectral_scale.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from spectral_scale.checkpoint.names import commit, step_name, writing_path
from spectral_scale.checkpoint.reader import verify_files
from spectral_scale.checkpoint.strict_json import plain
from spectral_scale.checkpoint.write_plan import (
    FileGroups,
    check_chunks,
    describe,
    group_files,
    join_plans,
)
from spectral_scale.errors import CheckpointError
from spectral_scale.files.durable import free_bytes, fsync_directory
from spectral_scale.parallel.chunks import TensorChunk
from spectral_scale.parallel.collective import Collective

_T = TypeVar("_T")
_GIB = 2**30
_SPACE_MARGIN = 1.01
"""Room for the list of files in the manifest, which is not known yet, and for the file system."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_checkpoint(
    root: Path,
    step: int,
    chunks: Iterable[TensorChunk],
    *,
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    collective: Collective,
    open_new: FileOpener = create_file,
) -> Path:
    """Write ROOT/step_XXXXXXXX and return it. Collective: every rank calls it with its own chunks.

    Over all ranks the chunks must tile every logical tensor exactly; `state` and `identity` are
    JSON values, rank 0's are stored. ROOT must be on a file system that all ranks see. A
    checkpoint of the same step is replaced. Raises CheckpointError on every rank if any rank
    fails, naming it; then nothing of the new checkpoint is left.
    """
    save = _Save(Path(root), int(step), collective, open_new)
    try:
        return save.run(chunks, state, identity)
    except CheckpointError:
        save.discard()
        raise


@dataclass
class _Save:
    """One save; `run` gives the order of its steps, each of them collective.

    Only rank 0 holds the plans and the manifest; on other ranks these values are None, and the
    steps that need them do nothing there but agree.
    """

    root: Path
    step: int
    collective: Collective
    open_new: FileOpener
    bytes_needed: int = 0
    """Bytes of this rank's files once they are planned; on rank 0, later, those of all ranks."""

    @property
    def writing(self) -> Path:
        return writing_path(self.root, self.step)

    def run(
        self, chunks: Iterable[TensorChunk], state: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> Path:
        plan, files = self._together("plan", lambda: self._plan(chunks))
        plans = self.collective.gather_json(plan)
        manifest = self._together("prepare", lambda: self._prepare(plans, state, identity))
        written = self._together("write", lambda: self._write(files))
        entries = self._share(written)
        self._together("read back", lambda: self._read_back(entries))
        return self._together("commit", lambda: self._commit(manifest, entries))

    def discard(self) -> None:
        """Remove what was written; every rank has stopped writing when this is called."""
        if self.collective.rank == 0:
            shutil.rmtree(self.writing, ignore_errors=True)

    def _together(self, what: str, action: Callable[[], _T]) -> _T:
        """Run `action` on every rank; raise on all ranks if it failed on one.

        A rank that raised by itself would leave the others waiting in the next collective. So a
        failure is kept until all ranks have told theirs: on three ranks, of which the disk of rank
        1 is full, all three raise "step 200 was not saved: ..." with the reason of rank 1.
        """
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        failure = self.collective.agree(None if error is None else self._explain(error), what=what)
        if error is not None or failure is not None:
            raise CheckpointError(f"step {self.step} was not saved: {failure}") from error
        return result

    def _explain(self, error: Exception) -> str:
        if isinstance(error, CheckpointError):
            return str(error)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return f"{_no_space(self.root, self.bytes_needed)} ({error})"
        return f"{type(error).__name__}: {error}"

    def _plan(self, chunks: Iterable[TensorChunk]) -> tuple[dict[str, Any], FileGroups]:
        step_name(self.step)
        listed = check_chunks(chunks)
        files = group_files(self.collective.rank, listed)
        plan = describe(listed, files)
        self.bytes_needed = plan["bytes"]
        return plan, files

    def _prepare(
        self,
        plans: list[dict[str, Any]] | None,
        state: Mapping[str, Any],
        identity: Mapping[str, Any],
    ) -> Manifest | None:
        """Rank 0: check that the plans fit together and on the disk, and create the folder."""
        if plans is None:
            return None
        manifest = Manifest(
            step=self.step,
            world_size=self.collective.world_size,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            package_version=__version__,
            files={},  # hashes are known when the files are written; `_commit` fills them in
            tensors=join_plans(plans),
            state=plain(state, where="state"),
            identity=plain(identity, where="identity"),
        )
        self.bytes_needed = sum(plan["bytes"] for plan in plans) + len(encode_manifest(manifest))
        self._create_folder()
        return manifest

    def _create_folder(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        final = self.root / step_name(self.step)
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise CheckpointError(f"{final} is in the way: not a folder; move it elsewhere")
        if self.writing.exists():
            shutil.rmtree(self.writing)
        free = free_bytes(self.root)
        if free is not None and self.bytes_needed * _SPACE_MARGIN > free:
            raise CheckpointError(_no_space(self.root, self.bytes_needed))
        self.writing.mkdir()

    def _write(self, files: FileGroups) -> dict[str, dict[str, Any]]:
        entries = {}
        for name, chunks in files:
            path = self.writing / name
            sha256 = write_chunks(path, chunks, open_new=self.open_new)
            entries[name] = asdict(FileEntry(bytes=path.stat().st_size, sha256=sha256))
        return entries

    def _share(self, written: dict[str, dict[str, Any]]) -> dict[str, FileEntry]:
        """Every rank's file entries, on every rank."""
        gathered = self.collective.gather_json(written)
        merged = {name: entry for part in gathered or [] for name, entry in part.items()}
        shared = self.collective.broadcast_json(merged)
        return {name: FileEntry(**entry) for name, entry in shared.items()}

    def _read_back(self, entries: Mapping[str, FileEntry]) -> None:
        """Each rank hashes its share: where possible another rank's files, to go past caches.

        With a file from each of three ranks, rank 0 reads that of rank 1, rank 1 that of rank 2,
        and rank 2 that of rank 0: a host that did not write a file cannot answer from its memory.
        """
        rank, world_size = self.collective.rank, self.collective.world_size
        verify_files(self.writing, entries, sorted(entries)[(rank + 1) % world_size :: world_size])

    def _commit(self, manifest: Manifest | None, entries: Mapping[str, FileEntry]) -> Path:
        final = self.root / step_name(self.step)
        if manifest is None:
            return final
        data = encode_manifest(replace(manifest, files=entries))
        decode_manifest(data)  # what no reader would accept must not become a checkpoint
        path = self.writing / MANIFEST_NAME
        write_bytes(path, data, open_new=self.open_new)
        if path.read_bytes() != data:
            raise CheckpointError(f"{MANIFEST_NAME}: reads back differently from what was written")
        fsync_directory(self.writing)
        commit(self.writing, final)
        return final


def _no_space(root: Path, needed: int) -> str:
    while not root.exists():  # the folder of a new run; its file system is that of a parent
        root = root.parent
    free = free_bytes(root)
    have = "an unknown rest" if free is None else f"{free / _GIB:.3g} GiB"
    return (
        f"no space: need {needed / _GIB:.3g} GiB, have {have} at {root}; "
        "free space or lower checkpoint.keep_last"
    )
