"""A run sets the precision of its products itself, whatever a script or the environment left."""

import logging
from collections.abc import Iterator

import pytest
import torch

from spectral_scale.config.schema import TrainConfig
from spectral_scale.engine.numerics import set_numerics

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def settings_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_float32_matmul_precision("highest")
    MATMUL.allow_bf16_reduced_precision_reduction = True
    MATMUL.allow_fp16_reduced_precision_reduction = True


def test_forced_tf32_and_reduced_sums_are_off(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_float32_matmul_precision("high")
    with caplog.at_level(logging.INFO):
        set_numerics(TrainConfig(), torch.device("cuda"))
    assert MATMUL.fp32_precision == "ieee"
    assert not MATMUL.allow_bf16_reduced_precision_reduction
    assert "numerics: float32 products ieee on GPUs" in caplog.text


def test_tf32_by_its_key() -> None:
    set_numerics(TrainConfig(tf32=True), torch.device("cuda"))
    assert MATMUL.fp32_precision == "tf32"


def test_deterministic_kernels_are_demanded_on_gpus_and_preferred_on_cpus() -> None:
    set_numerics(TrainConfig(deterministic=True), torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    set_numerics(TrainConfig(), torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    set_numerics(TrainConfig(), torch.device("cpu"))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
