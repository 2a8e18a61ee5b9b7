"""Shared by the tests of several ranks: the run of one process that theirs is compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config, train_tiny


@pytest.fixture(scope="session")
def train_alone(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """One process's result on plain torch, trained once for each set of settings that matter.

    Settings of `parallel` are left out: they say how several ranks would divide the same run.
    """
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def train(settings: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in settings.items() if not k.startswith("parallel__")}
        key = tuple(sorted(kept.items()))
        if key not in known:
            config = tiny_config(corpus, tmp_path_factory.mktemp("alone"), **kept)
            known[key] = run_distributed(train_tiny, 1, config)[0]
        return known[key]

    return train
