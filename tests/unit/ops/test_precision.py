"""What lowers the precision of products is kept out of what must be exact."""

import os
from collections.abc import Iterator

import pytest
import torch

from spectral_scale.ops.precision import (
    describe_precision,
    exact_products,
    set_determinism,
    set_product_precision,
)

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def settings_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = CPU.fp32_precision = "none"
    CUDA.allow_bf16_reduced_precision_reduction = True
    CUDA.allow_fp16_reduced_precision_reduction = True


@pytest.mark.parametrize("forced", ["high", "medium"])
def test_a_forced_precision_is_blocked_and_restored(forced: str) -> None:
    torch.set_float32_matmul_precision(forced)
    before = CUDA.fp32_precision, CPU.fp32_precision
    assert before[0] == "tf32"
    with pytest.raises(KeyError), exact_products():
        assert (CUDA.fp32_precision, CPU.fp32_precision) == ("ieee", "ieee")
        assert torch.get_float32_matmul_precision() == "highest" and not CUDA.allow_tf32
        raise KeyError  # an error inside restores all the same
    assert (CUDA.fp32_precision, CPU.fp32_precision) == before
    assert torch.get_float32_matmul_precision() == forced


def test_torchs_newer_switch_is_blocked_and_restored() -> None:
    """Its state and that of the older one may disagree; torch then refuses to read the older."""
    CUDA.fp32_precision = "tf32"
    with exact_products():
        assert CUDA.fp32_precision == "ieee" and not CUDA.allow_tf32
    assert CUDA.fp32_precision == "tf32"


def test_exact_settings_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: pytest.fail())
        with exact_products():
            pass


def test_autocast_is_off_inside() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with exact_products():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_settings_of_a_run() -> None:
    """A run takes TF32 by its own key alone, whatever was set before, and sums in float32."""
    torch.set_float32_matmul_precision("high")
    assert "bf16 and fp16" in describe_precision()
    set_product_precision(tf32=False)
    assert CUDA.fp32_precision == "ieee" and not CUDA.allow_tf32
    assert not CUDA.allow_bf16_reduced_precision_reduction
    assert not CUDA.allow_fp16_reduced_precision_reduction
    assert describe_precision().startswith(
        "float32 products ieee on GPUs and ieee on CPUs, reduced-precision sums off"
    )
    set_product_precision(tf32=True)
    assert CUDA.fp32_precision == "tf32" and "tf32 on GPUs" in describe_precision()


def test_determinism_gives_cublas_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it torch refuses every product on a GPU. A user's own choice stays."""
    set_determinism(on_cuda=False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    set_determinism(on_cuda=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_determinism(on_cuda=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert "deterministic kernels on" in describe_precision()
