"""What a method adds to a checkpoint folder that somebody else's trainer wrote.

Each rank writes one safetensors file with the tensors it owns; any number of ranks reads them
back. The files say which values the model had when they were written, so that state of one step is
never combined with weights of another.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectral_scale.errors import CheckpointError, ResumeMismatchError
from spectral_scale.files.durable import fsync_path

PREFIX = "spectral_scale"
_ADVICE = "resume from an earlier checkpoint"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files of a checkpoint say besides their tensors."""

    applied_steps: int
    """Optimizer steps taken when it was written."""
    fingerprint: str
    """That of the model's trained values; see `fingerprint`."""
    settings: Mapping[str, Any]
    """The method's settings, which a resumed training must have as well."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the bytes of all trained parameters, in the model's order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            flat = parameter.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], facts: Facts, *, rank: int, world_size: int
) -> None:
    """Write this rank's file, durably and in one rename. Raises CheckpointError."""
    file = folder / f"{PREFIX}-{rank:05d}-of-{world_size:05d}.safetensors"
    writing = file.with_suffix(".writing")
    metadata = {
        "applied_steps": str(facts.applied_steps),
        "fingerprint": facts.fingerprint,
        "settings": json.dumps(facts.settings, sort_keys=True),
        "world_size": str(world_size),
    }
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            _remove_those_of_another_world(folder, world_size)
        save_file(on_host, writing, metadata)
        fsync_path(writing)
        os.replace(writing, file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be written ({error})") from error


def _remove_those_of_another_world(folder: Path, world_size: int) -> None:
    """A folder that is written again by fewer or more ranks keeps no file of the earlier ones."""
    for file in folder.glob(f"{PREFIX}-*-of-*.safetensors"):
        if not file.stem.endswith(f"-of-{world_size:05d}"):
            file.unlink()


def read_files(folder: Path) -> tuple[dict[str, Tensor], Facts]:
    """The tensors of all ranks, mapped into memory, and what the files say.

    Raises CheckpointError if there are none, if one is missing, or if one cannot be read.
    """
    files = sorted(folder.glob(f"{PREFIX}-*-of-*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: no {PREFIX}-*.safetensors, which the method's callback writes after the "
            f"trainer's own files: it was not attached, or saving was interrupted; {_ADVICE}"
        )
    tensors: dict[str, Tensor] = {}
    found: list[dict[str, str]] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
                found.append(opened.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); {_ADVICE}") from error
    return tensors, _facts(folder, found)


def _facts(folder: Path, found: list[dict[str, str]]) -> Facts:
    """What all files say alike. Raises CheckpointError if they differ or one is missing."""
    first = found[0]
    if not first.keys() >= {"applied_steps", "fingerprint", "settings", "world_size"}:
        raise CheckpointError(f"{folder}: its {PREFIX} files were not written here; {_ADVICE}")
    if any(metadata != first for metadata in found) or len(found) != int(first["world_size"]):
        raise CheckpointError(
            f"{folder}: {len(found)} files of {first['world_size']} ranks, which must be of "
            f"one step: saving was interrupted; {_ADVICE}"
        )
    return Facts(
        applied_steps=int(first["applied_steps"]),
        fingerprint=first["fingerprint"],
        settings=json.loads(first["settings"]),
    )


def find_saved(folders: Iterable[Path], model: nn.Module) -> tuple[Path, dict[str, Tensor], Facts]:
    """The folder whose files belong to the values that the model has now, and what they hold.

    Raises CheckpointError if none does.
    """
    wanted, problems = fingerprint(model), []
    for folder in dict.fromkeys(folders):
        try:
            tensors, facts = read_files(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if facts.fingerprint == wanted:
            return folder, tensors, facts
        problems.append(f"{folder}: belongs to other weights than the model has")
    raise CheckpointError(
        "no checkpoint folder belongs to the weights that were loaded: "
        + "; ".join(problems)
        + "; if the checkpoint lies elsewhere, give its path as resume_from= when attaching"
    )


def require_settings(folder: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise ResumeMismatchError if the settings of a resumed training differ, naming each."""
    plain = json.loads(json.dumps(present))
    keys = sorted(saved.keys() | plain.keys())
    differing = [
        f"{key}: {saved.get(key)} -> {plain.get(key)}"
        for key in keys
        if saved.get(key) != plain.get(key)
    ]
    if differing:
        raise ResumeMismatchError(
            f"{folder} was saved with other settings ({'; '.join(differing)}); resume with the same"
        )
