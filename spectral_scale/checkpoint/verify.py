"""Lists and verifies the checkpoints of a folder without changing anything."""

import os
from dataclasses import dataclass
from pathlib import Path

from spectral_scale.checkpoint.manifest import MANIFEST_NAME
from spectral_scale.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints, step_of
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """One checkpoint after every byte was held against its manifest."""

    path: Path
    """Folder of the checkpoint."""
    step: int | None
    """Optimizer steps applied; None if only a damaged manifest would say."""
    bytes: int
    """Size of its data files; of a bad one, of whatever is in the folder."""
    fault: str | None
    """The damaged file and the kind of damage; None if all files are good."""

    @property
    def good(self) -> bool:
        """True if a run can resume from this checkpoint."""
        return self.fault is None


def inspect_checkpoints(path: str | Path) -> list[CheckpointStatus]:
    """Verify a run folder's checkpoints, a checkpoints folder, or one checkpoint; newest first.

    Raises CheckpointError if there is none.
    """
    return [_inspect(folder) for folder in find_checkpoints(Path(path))]


def find_checkpoints(path: Path) -> list[Path]:
    """Checkpoint folders that `path` means: itself, those in it, or those in path/checkpoints."""
    if (path / MANIFEST_NAME).exists() or step_of(path.resolve().name) is not None:
        found = [path] if path.is_dir() else []
    else:
        found = list_checkpoints(path) or list_checkpoints(path / CHECKPOINTS_NAME)
    if not found:
        raise CheckpointError(
            f"no checkpoint at {path}; give a run folder, its {CHECKPOINTS_NAME} folder, "
            "or one step_XXXXXXXX folder"
        )
    return found


def _inspect(folder: Path) -> CheckpointStatus:
    try:
        with CheckpointReader.open(folder) as reader:
            return CheckpointStatus(
                path=folder, step=reader.step, bytes=reader.num_bytes, fault=None
            )
    except (CheckpointError, OSError) as error:
        return CheckpointStatus(
            path=folder, step=step_of(folder.name), bytes=_size(folder), fault=str(error)
        )


def _size(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
