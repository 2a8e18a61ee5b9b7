"""Adam's epsilon that `auto` stands for is what steps the run, and what a resumed one compares."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectral_scale.config.check import check_config
from spectral_scale.engine.build import build_run
from spectral_scale.engine.identity import run_identity
from spectral_scale.engine.run_folder import create_run_folder
from spectral_scale.parallel.facts import detect_rank_facts
from spectral_scale.testing.tiny import tiny_config


@pytest.mark.parametrize(("method", "epsilon"), [("sst", 1e-6), ("full", 1e-8), ("galore", 1e-8)])
def test_the_optimizer_has_the_method_s(
    method: str, epsilon: float, corpus: Path, tmp_path: Path
) -> None:
    config = tiny_config(corpus, tmp_path, spectral__method=method, optimizer__eps="auto")
    create_run_folder(Path(config.train.run_dir))
    run = build_run(config, detect_rank_facts())
    assert {group["eps"] for group in run.optimizer.param_groups} == {epsilon}
    run.backend.close()


def test_auto_and_the_number_are_one_run(corpus: Path, tmp_path: Path) -> None:
    loader: Any = SimpleNamespace(state_fingerprint={})
    auto, number, other = (
        run_identity(config, check_config(config, world_size=1), loader)
        for value in ("auto", 1e-6, 1e-8)
        for config in [tiny_config(corpus, tmp_path, optimizer__eps=value)]
    )
    assert auto == number != other
