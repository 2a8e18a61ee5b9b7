"""A run that is resumed with another schedule says by how much its learning rates jump."""

from pathlib import Path

import pytest

from spectral_scale.cli.main import main
from spectral_scale.testing.tiny import tiny_words


def test_a_longer_cosine_is_said_on_resume(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"train__steps": 4, "checkpoint__interval": 2, "optimizer__schedule": "cosine"}
    rates = {"optimizer__warmup_steps": 0, "optimizer__lr": 1e-3, "optimizer__spectral_lr": 2e-3}
    changes = short | {"optimizer__min_lr_ratio": 0.0} | rates
    assert main(["train", *tiny_words(corpus, tmp_path, **changes)]) == 0
    assert "learning rates jump" not in capsys.readouterr().err
    assert main(["train", *tiny_words(corpus, tmp_path, **changes | {"train__steps": 9})]) == 0
    error = capsys.readouterr().err
    # Step 5 of 9 of a cosine without warm-up: 0.5 + 0.5 cos(5 pi / 9).
    assert "learning rates jump at step 4" in error and "train.steps (4 -> 9)" in error
    assert "optimizer.lr 0 -> 0.0004132, optimizer.spectral_lr 0 -> 0.0008264" in error
