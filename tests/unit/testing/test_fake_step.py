"""A whole step of the training loop is counted on a CUDA device that is not there."""

from typing import Any

import pytest

from spectral_scale.models.loss_chunks import CHUNK_BYTES
from spectral_scale.testing.fake_cuda import missing, on_fake_cuda

pytestmark = pytest.mark.slow
needs_fake_cuda = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def step(family: str, backend: str, world_size: int, tokens: int = 64) -> dict[str, Any]:
    """A step of one block, 2 sequences of `tokens` on each rank."""
    from spectral_scale.testing.fake_step import count_step

    changes = {
        "model.name": family,
        "model.num_layers": 1,
        "model.sequence_length": tokens,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 2 * world_size,
        "parallel.backend": backend,
    }
    return count_step(changes, world_size)


@needs_fake_cuda
@pytest.mark.parametrize(("backend", "world_size"), [("torch", 1), ("fsdp2", 8)])
def test_an_opt_step_waits_for_no_value_of_its_own(backend: str, world_size: int) -> None:
    found = on_fake_cuda(step, "opt-125m", backend, world_size)
    assert found["step"]["waits"] == 0
    operators = found["step"]["by_operator"]
    assert operators["_fused_adamw_"] >= 1, "the step was refused"
    assert operators["_scaled_dot_product_flash_attention"] == 1
    collectives = found["step"]["collectives"]
    assert ("reduce_scatter_base" in collectives) == (backend == "fsdp2")


def step_that_is_asked_first() -> dict[str, Any]:
    """A step whose update the host decides."""
    from unittest.mock import patch

    from spectral_scale.backends.torch.backend import TorchBackend

    with patch.object(TorchBackend, "_obeys_on_device", lambda _: False):
        return step("opt-125m", "torch", 1)


@needs_fake_cuda
def test_a_host_that_decides_waits() -> None:
    assert on_fake_cuda(step_that_is_asked_first)["step"]["waits"] == 1


@needs_fake_cuda
@pytest.mark.parametrize(("backend", "world_size"), [("torch", 1), ("fsdp2", 8)])
def test_logits_of_all_tokens_never_exist_in_fp32(backend: str, world_size: int) -> None:
    """4096 tokens of 50,272 words are 824 MB; a chunk's are at most 537."""
    found = on_fake_cuda(step, "opt-125m", backend, world_size, 2048)
    assert max(found["step"]["largest"].values()) <= CHUNK_BYTES
