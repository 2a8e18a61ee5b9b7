"""Copies of a background save: on a GPU they are queued and kept, on the CPU they are made."""

from typing import Any

import pytest
import torch

from spectral_scale.engine.host_copies import HostCopies
from spectral_scale.parallel.chunks import whole
from spectral_scale.testing.fake_cuda import missing, on_fake_cuda


def test_copies_on_the_host_are_their_own() -> None:
    tensor = torch.ones(3)
    copies = HostCopies()
    (taken,) = copies.take([whole("a", tensor)])
    copies.before_change()
    tensor.zero_()
    copies.wait()
    assert taken.tensor.tolist() == [1.0] * 3 and taken.name == "a"


def two_saves(blocking: bool) -> dict[str, Any]:
    """Two saves of three tensors on a GPU."""
    from unittest.mock import patch

    from spectral_scale.testing.launches import Launches

    chunks = [whole(str(i), torch.zeros(4, device="cuda")) for i in range(3)]
    copies = HostCopies()

    def at_once(_: HostCopies, chunk: Any) -> torch.Tensor:
        host: torch.Tensor = chunk.tensor.to("cpu", copy=True)
        return host

    copy = at_once if blocking else HostCopies._copy
    with Launches() as seen, patch.object(HostCopies, "_copy", copy):
        first, second = copies.take(chunks), copies.take(chunks)
        copies.before_change()
        copies.wait()
    same = [a.tensor is b.tensor for a, b in zip(first, second, strict=True)]
    return {"waits": seen.waits, "kept": same}


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("blocking", [False, True])
def test_a_gpu_is_not_waited_for_and_buffers_stay(blocking: bool) -> None:
    found = on_fake_cuda(two_saves, blocking)
    assert found == {"waits": 6 * blocking, "kept": [not blocking] * 3}
