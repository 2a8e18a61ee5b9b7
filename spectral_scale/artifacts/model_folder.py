"""Writes a dense model as a transformers folder, completely or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from spectral_scale.errors import CheckpointError, ConfigError
from spectral_scale.files.durable import free_bytes, fsync_directory, fsync_path
from spectral_scale.files.json_text import parse_json
from spectral_scale.methods.layer import factored_layers

RECORD_NAME = "spectral_scale.json"
"""The file in an exported folder that says what it was made from."""
RECORD_FORMAT = "spectral_scale.export"
_SPACE_MARGIN = 1.01
_OTHER_FILES_BYTES = 16 << 20
_GIB = 2**30


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Make a folder beside `output` that takes its name when the block ends without an error.

    On any error the new folder is removed and `output` does not exist. Raises ConfigError if
    `output` exists and is not an empty folder, or cannot be made.
    """
    output = Path(os.path.abspath(output))
    refuse_occupied(output)
    staging = output.with_name(f".writing_{output.name}_{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written ({error.strerror}); give a folder you may write"
        ) from None
    try:
        yield staging
        _make_durable(staging)
        refuse_occupied(output)
        staging.rename(output)
        fsync_directory(output.parent)
    except OSError as error:
        raise CheckpointError(_explain(error, output)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_occupied(output: Path) -> None:
    """Raise ConfigError unless `output` does not exist or is an empty folder."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"--output {output} is not a folder; give a new one")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"--output {output} is not empty (it has {min(output.iterdir()).name!r}); give a new "
            "folder, or remove this one"
        )


def write_model(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a dense model's weights, config.json and generation_config.json.

    Weights are cast to `dtype` in place; tied ones are stored once. Raises CheckpointError if the
    disk has no space for them, and ValueError if a layer is not dense.
    """
    if factored_layers(model):
        raise ValueError("the model holds converted layers; merge() it first")
    for parameter in model.parameters():  # not buffers: rotary frequencies stay exact
        parameter.data = parameter.data.to(dtype)
    require_space(folder, sum(p.nbytes for p in model.parameters()))
    model.config.use_cache = True  # training switches it off; generating without it is slow
    model.generation_config.use_cache = True
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise CheckpointError(f"{folder.parent}: the weights cannot be written: {error}") from error


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the files of a tokenizer folder byte for byte, and return their names."""
    files = sorted(path for path in source.iterdir() if path.is_file())
    taken = [path.name for path in files if (folder / path.name).exists()]
    if not files or taken:
        what = f"also holds {taken}" if taken else "is empty"
        raise CheckpointError(f"the tokenizer folder {source} {what}; give the tokenizer alone")
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in files]


def write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what the folder was made from (RECORD_NAME)."""
    document = {"format": RECORD_FORMAT, "format_version": 1, **facts}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    (folder / RECORD_NAME).write_text(text, encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Read what write_record wrote; empty for a folder of other origin. Raises ConfigError."""
    try:
        text = (folder / RECORD_NAME).read_text(encoding="utf-8")
        record = parse_json(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / RECORD_NAME} cannot be read: {error}; export again") from None
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise ConfigError(f"{folder / RECORD_NAME} is not a record of an export; export again")
    return record


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError if the disk of `folder` cannot hold that many bytes of weights."""
    needed = int(num_bytes * _SPACE_MARGIN) + _OTHER_FILES_BYTES
    free = free_bytes(folder)
    if free is not None and needed > free:
        raise CheckpointError(
            f"no space: the folder needs {needed / _GIB:.3g} GiB, have {free / _GIB:.3g} GiB at "
            f"{folder.parent}; free space, or export with --dtype bf16"
        )


def _make_durable(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
        fsync_path(path)
    fsync_directory(folder)


def _explain(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left while writing {output} ({error}); free space and export again"
    return f"{output} cannot be written: {error}"
