"""A transformers folder appears whole under its name, or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from spectral_scale.artifacts import model_folder as export
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import CheckpointError, ConfigError
from spectral_scale.methods.sst.layer import convert


def make_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    config.use_cache = False
    return OPTForCausalLM(config)


def test_a_finished_folder_takes_its_name(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with export.staged_folder(output) as folder:
        (folder / "a").write_text("x")
        assert not output.exists() and folder.parent == output.parent
    assert [p.name for p in output.parent.iterdir()] == ["out"]
    assert (output / "a").read_text() == "x"


def test_an_empty_folder_is_taken_over(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with export.staged_folder(output) as folder:
        (folder / "a").write_text("x")
    assert (output / "a").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, CheckpointError])
def test_an_interrupted_folder_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), export.staged_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="no space left"),
        export.staged_folder(tmp_path / "out") as folder,
    ):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["filled", "file", "link"])
def test_an_occupied_output_is_refused(kind: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "filled":
        output.mkdir()
        (output / "mine").write_text("x")
    elif kind == "file":
        output.write_text("x")
    else:
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="give a new"), export.staged_folder(output):
        pytest.fail("the folder must not be staged")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match="not empty"), export.staged_folder(output) as folder:
        (folder / "ours").write_text("x")
        output.mkdir()
        (output / "theirs").write_text("y")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in output.iterdir()] == ["theirs"]


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        export.staged_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("the folder must not be staged")


def test_tied_weights_are_written_once_and_ties_kept(tmp_path: Path) -> None:
    model = make_opt()
    export.write_model(model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True and config["dtype"] == "bfloat16"


def test_a_model_that_is_not_dense_is_refused(tmp_path: Path) -> None:
    model = make_opt()
    convert(model, SpectralConfig(spectral_rank=2))
    with pytest.raises(ValueError, match="merge"):
        export.write_model(model, tmp_path, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_found_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "free_bytes", lambda _: 1 << 20)
    with (
        pytest.raises(CheckpointError, match=r"needs .* GiB, have 0\.000977 GiB"),
        export.staged_folder(tmp_path / "out") as folder,
    ):
        export.write_model(make_opt(), folder, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_the_weights_cannot_be_written_to_a_full_disk(tmp_path: Path) -> None:
    """/dev/full fails every write with ENOSPC, as a disk that fills up half-way does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(CheckpointError, match=r"(?i)no space left"),
        export.staged_folder(tmp_path / "out") as folder,
    ):
        (folder / "config.json").symlink_to("/dev/full")
        export.write_model(make_opt(), folder, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source, folder = tmp_path / "tokenizer", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    with pytest.raises(CheckpointError, match="is empty"):
        export.copy_tokenizer(source, folder)
    (source / "tokenizer.json").write_bytes(b'{"a": 1}\r\n')
    assert export.copy_tokenizer(source, folder) == ["tokenizer.json"]
    assert (folder / "tokenizer.json").read_bytes() == b'{"a": 1}\r\n'
    with pytest.raises(CheckpointError, match="also holds"):
        export.copy_tokenizer(source, folder)


def test_a_record_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert export.read_record(tmp_path) == {}
    export.write_record(tmp_path, {"step": 3})
    assert export.read_record(tmp_path)["step"] == 3
    for text in ("{", "[]", '{"format": "other"}'):
        (tmp_path / export.RECORD_NAME).write_text(text)
        with pytest.raises(ConfigError, match="export again"):
            export.read_record(tmp_path)
