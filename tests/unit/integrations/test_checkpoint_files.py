"""What ranks write beside a trainer's files, and what is refused of it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from spectral_scale.errors import CheckpointError, ResumeMismatchError
from spectral_scale.integrations.checkpoint_files import (
    Facts,
    find_saved,
    fingerprint,
    read_files,
    require_settings,
    write_files,
)


def facts(model: nn.Module, steps: int = 3) -> Facts:
    settings = {"spectral.spectral_rank": 4, "spectral.targets": []}
    return Facts(applied_steps=steps, fingerprint=fingerprint(model), settings=settings)


def write(folder: Path, model: nn.Module, world: int = 2, steps: int = 3) -> None:
    for rank in range(world):
        tensors = {f"bank/{rank}": torch.full((2,), float(rank))}
        write_files(folder, tensors, facts(model, steps), rank=rank, world_size=world)


def test_what_all_ranks_wrote_is_read_by_any_number(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    write(tmp_path, model)
    tensors, found = read_files(tmp_path)
    assert {k: v.tolist() for k, v in tensors.items()} == {"bank/0": [0, 0], "bank/1": [1, 1]}
    assert found == facts(model)
    write(tmp_path, model, world=1)  # the same folder, written again by fewer ranks
    assert list(read_files(tmp_path)[0]) == ["bank/0"]


def test_a_set_that_is_not_whole_or_of_two_steps_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    write(tmp_path, model)
    write_files(tmp_path, {}, facts(model, steps=4), rank=0, world_size=2)
    with pytest.raises(CheckpointError, match="must be of one step"):
        read_files(tmp_path)
    write(tmp_path, model)
    (tmp_path / "spectral_scale-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 files of 2 ranks"):
        read_files(tmp_path)
    (tmp_path / "spectral_scale-00000-of-00002.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_files(tmp_path)


def test_the_folder_is_found_by_the_weights(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    write(tmp_path / "a", model)
    write(tmp_path / "b", other)
    folders = [tmp_path / "missing", tmp_path / "a", tmp_path / "b"]
    assert find_saved(folders, other)[0] == tmp_path / "b"
    with torch.no_grad():
        other.weight[0, 0] += 1e-6
    with pytest.raises(CheckpointError, match="belongs to other weights"):
        find_saved(folders, other)


def test_frozen_values_are_no_part_of_the_fingerprint() -> None:
    model = nn.Linear(2, 2).bfloat16()
    model.bias.requires_grad_(False)
    before = fingerprint(model)
    model.bias.data += 1
    assert fingerprint(model) == before
    model.weight.data += 1
    assert fingerprint(model) != before


def test_other_settings_are_named() -> None:
    require_settings(Path("c"), {"a": [1], "b": 2}, {"a": (1,), "b": 2})
    with pytest.raises(ResumeMismatchError, match="b: 2 -> 3"):
        require_settings(Path("c"), {"a": 1, "b": 2}, {"a": 1, "b": 3})
