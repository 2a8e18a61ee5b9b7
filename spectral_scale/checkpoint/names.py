"""The checkpoints folder: which names mean what, and what may be removed.

Only names that match exactly, directly under the resolved root, are ever touched; links never.
"""

import os
import re
import shutil
from pathlib import Path

from spectral_scale.errors import CheckpointError
from spectral_scale.files.durable import fsync_directory

CHECKPOINTS_NAME = "checkpoints"
_STEP = re.compile(r"step_([0-9]{8})")
_REPLACED = re.compile(r"\.replaced_step_([0-9]{8})")
_LEFTOVER = re.compile(r"\.(writing|removing)_step_[0-9]{8}")
MAX_STEP = 99_999_999


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name, or None if the name is not one."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def step_name(step: int) -> str:
    """`step_00000200` for 200. Raises CheckpointError outside 0 .. 99,999,999."""
    if not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"step {step} cannot be saved; steps are 0 to {MAX_STEP}")
    return f"step_{step:08d}"


def writing_path(root: Path, step: int) -> Path:
    """The folder of a checkpoint until it is complete."""
    return root / f".writing_step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoint folders, newest first; none if the root does not exist.

    A folder that was moved aside by a commit which was then killed counts under its own step.
    """
    by_step: dict[int, Path] = {}
    for path in _folders(root):
        aside = _REPLACED.fullmatch(path.name)
        step = int(aside.group(1)) if aside else step_of(path.name)
        if step is not None and not (aside and step in by_step):
            by_step[step] = path
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def commit(writing: Path, final: Path) -> None:
    """Give a complete folder its final name by one rename, replacing an older one of that name.

    A process killed between the two renames leaves the older checkpoint under `.replaced_...`:
    `list_checkpoints` still counts it, and `remove_leftovers` gives it its name back.
    """
    root = final.parent
    aside = root / f".replaced_{final.name}"
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    writing.rename(final)
    fsync_directory(root)
    shutil.rmtree(aside, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint folder; killed half-way, no half of it keeps a checkpoint's name."""
    aside = path.with_name(f".removing_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def remove_leftovers(root: Path) -> list[str]:
    """Clean up after killed processes; returns the names removed. Needs the run's lock."""
    removed = []
    for path in _folders(root):
        aside = _REPLACED.fullmatch(path.name)
        final = root / path.name.removeprefix(".replaced_")
        if aside and not final.exists():
            path.rename(final)
        elif aside or _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return sorted(root / e.name for e in entries if e.is_dir(follow_symlinks=False))
