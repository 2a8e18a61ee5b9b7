"""Weights of a folder: read by name, confined to the folder, never unpickled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectral_scale.config.presets import resolve_architecture
from spectral_scale.config.schema import ModelConfig
from spectral_scale.errors import ConfigError
from spectral_scale.models.build import build_model
from spectral_scale.models.folder import check_folder, load_folder
from spectral_scale.models.weights import FolderWeights

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tensors in one file."""
    made = tmp_path / "model"
    made.mkdir()
    tensors = {"model.a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4).half()}
    save_file(tensors, made / "model.safetensors")
    return made


def split(folder: Path, weight_map: dict[str, Any]) -> None:
    """Name the folder's files in an index instead."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_values_come_by_name_in_float32(folder: Path) -> None:
    weights = FolderWeights(folder)
    assert torch.equal(weights.get("model.a.weight", (2, 3)), torch.arange(6.0).view(2, 3))
    value = weights.get("b.bias", (4,))
    assert value.dtype == torch.float32 and torch.equal(value, torch.ones(4))
    assert weights.read("b.bias").dtype == torch.float16
    assert weights.shape_and_dtype("b.bias") == ((4,), "F16")
    assert sorted(weights.names) == ["b.bias", "model.a.weight"]


def test_the_base_model_s_prefix_may_be_missing(folder: Path) -> None:
    weights = FolderWeights(folder)
    assert weights.stored_name("model.b.bias") == "b.bias"
    assert weights.stored_name("a.weight") is None


def test_a_missing_weight_and_another_shape_are_named(folder: Path) -> None:
    weights = FolderWeights(folder)
    with pytest.raises(ConfigError, match=r"holds no weight c\.weight; check the folder"):
        weights.get("c.weight", (1,))
    with pytest.raises(
        ConfigError, match=r"model\.a\.weight has shape \(2, 3\).* asks for \(3, 2\)"
    ):
        weights.get("model.a.weight", (3, 2))


def test_an_index_spreads_weights_over_files(folder: Path) -> None:
    save_file({"c.weight": torch.zeros(1)}, folder / "second.safetensors")
    split(folder, {"model.a.weight": "model.safetensors", "c.weight": "second.safetensors"})
    weights = FolderWeights(folder)
    assert weights.get("c.weight", (1,)).item() == 0
    assert weights.get("model.a.weight", (2, 3)).sum() == 15


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/x.safetensors", "none", "", 7])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: Any) -> None:
    save_file({"c": torch.zeros(1)}, folder.parent / "outside.safetensors")
    split(folder, {"c": name})
    with pytest.raises(ConfigError, match="not a file of this folder"):
        FolderWeights(folder)


def test_an_index_cannot_name_an_absolute_path(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    save_file({"c": torch.zeros(1)}, outside)
    split(folder, {"c": str(outside)})
    with pytest.raises(ConfigError, match="not a file of this folder"):
        FolderWeights(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(ConfigError, match="weights cannot be read"):
        FolderWeights(folder)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.witness,)  # type: ignore[return-value]


def test_pickles_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (folder / "model.safetensors").unlink()
    torch.save({"a": Bomb(witness)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    for read in (
        lambda: FolderWeights(folder),
        lambda: load_folder(folder, device=torch.device("cpu"), dtype=torch.float32),
    ):
        with pytest.raises(ConfigError, match=r"only as a pickle \(pytorch_model\.bin\).*convert"):
            read()
    assert not witness.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert witness.exists()  # it would have run


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00{}"]
)
def test_a_damaged_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="model"):
        FolderWeights(folder).get("model.a.weight", (2, 3))


def test_a_truncated_file_is_named(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(ConfigError, match="cannot be read"):
        FolderWeights(folder)


def test_a_folder_without_weights_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a folder written by save_pretrained"):
        FolderWeights(tmp_path)
    with pytest.raises(ConfigError, match=r"none holds no model\.safetensors"):
        FolderWeights(tmp_path / "none")


def test_a_saved_model_is_complete(saved: tuple[Any, Path]) -> None:
    plain, folder = saved
    config = ModelConfig(name=None, path=str(folder), sequence_length=32)
    model = build_model(resolve_architecture(config), config, eos_token_id=0)
    report = check_folder(folder, model)
    assert report.parameters == sum(p.numel() for p in plain.parameters())
    assert report.dtypes == ["F32"] and report.unused == []


def test_every_missing_or_misshapen_weight_is_listed(saved: tuple[Any, Path]) -> None:
    plain, folder = saved
    state = {k: v.clone() for k, v in plain.state_dict().items() if k != "lm_head.weight"}
    gone, changed = [name for name in state if "q_proj.weight" in name]
    del state[gone]
    state[changed] = state[changed][:, :-1].contiguous()
    save_file(state, folder / "model.safetensors")
    config = ModelConfig(name=None, path=str(folder), sequence_length=32)
    model = build_model(resolve_architecture(config), config, eos_token_id=0)
    with pytest.raises(ConfigError) as caught:
        check_folder(folder, model)
    assert f"no weight {gone}" in str(caught.value)
    assert f"{changed} has shape (48, 47), config.json asks for (48, 48)" in str(caught.value)
