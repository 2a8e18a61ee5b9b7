"""generation_config.json of a folder: fit to be exported, cleaned with a warning, or refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from spectral_scale.errors import ConfigError
from spectral_scale.models.folder import read_generation_config


def write(folder: Path, values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_a_folder_may_have_none(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None


def test_sampling_values_without_do_sample_can_be_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2})
    with pytest.raises(ValueError, match="do_sample"):  # what an export would run into
        GenerationConfig.from_pretrained(folder).validate(strict=True)
    with caplog.at_level(logging.WARNING, "spectral_scale"):
        found = read_generation_config(folder)
    assert "without do_sample" in caplog.text
    assert found is not None and (found.temperature, found.top_p) == (0.9, 0.6)
    found.use_cache = True
    found.save_pretrained(tmp_path / "written")
    assert json.loads((tmp_path / "written" / "generation_config.json").read_text())["do_sample"]


def test_settings_that_are_right_are_taken_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_generation_config(write(tmp_path, {"do_sample": True, "top_p": 0.6}))
    assert found is not None and found.top_p == 0.6 and not caplog.records
    greedy = read_generation_config(write(tmp_path, {"eos_token_id": 2}))
    assert greedy is not None and not greedy.do_sample


@pytest.mark.parametrize("values", [{"num_beams": 1, "num_return_sequences": 3}, [1, 2]])
def test_others_are_refused_before_training(tmp_path: Path, values: Any) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json.*remove it and start again"):
        read_generation_config(write(tmp_path, values))
