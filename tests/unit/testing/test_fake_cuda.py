"""Launches, bytes and waits are counted on a CUDA device that is not there."""

from typing import Any

import pytest

from spectral_scale.testing.fake_cuda import missing, on_fake_cuda

needs_fake_cuda = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def dense_layer(bias: bool) -> dict[str, Any]:
    """A forward and backward of one dense layer under bf16 autocast."""
    import torch

    from spectral_scale.testing.launches import Launches

    layer = torch.nn.Linear(2048, 2048, bias=bias, device="cuda")
    x = torch.randn(8192, 2048, device="cuda", requires_grad=True)
    with Launches() as counted:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.backward(torch.empty_like(y))
    return counted.figures() | {"dtype": str(y.dtype)}


def waits() -> int:
    """Three waits of the host, and what is none."""
    import torch

    from spectral_scale.testing.launches import Launches

    with Launches() as counted:
        x = torch.ones(4, device="cuda")
        (x + 1).sum().item()
        x.cpu()
        if x.any():
            x.to("cpu", non_blocking=True)
        torch.ones(4).sum().item()
    return counted.waits


@needs_fake_cuda
def test_a_dense_layer_is_counted() -> None:
    found = on_fake_cuda(dense_layer, True)
    assert found["dtype"] == "torch.bfloat16"
    assert found["launches"] == 10
    assert found["megabytes"] == pytest.approx(511, abs=1)


@pytest.mark.slow
@needs_fake_cuda
def test_the_host_waits_for_values_and_for_copies() -> None:
    assert on_fake_cuda(waits) == 3


@pytest.mark.slow
@needs_fake_cuda
def test_what_fails_there_is_told() -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        on_fake_cuda(fails)


def fails() -> None:
    """Import a module that does not exist."""
    import no_such_module  # noqa: F401  # type: ignore
