"""Tensors to be saved are looked at together, and the first bad one is named."""

import math

import pytest
import torch
from torch import Tensor

from spectral_scale.errors import SpectralScaleError
from spectral_scale.parallel.chunks import TensorChunk, whole
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.supervision.finite_check import require_finite_state


def chunks(bad: float) -> list[TensorChunk]:
    later = torch.ones(4)
    later[2] = math.nan
    first = torch.ones(3, 2, dtype=torch.float64)
    first[1, 1] = bad
    return [
        whole("count", torch.tensor(3)),
        whole("nothing", torch.empty(0)),
        whole("fine", torch.ones(2)),
        whole("first", first),
        whole("later", later),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_tensor_is_named(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: asked.append(1) or tolist(self))
    with pytest.raises(SpectralScaleError, match="step 8 was not saved.*first"):
        require_finite_state(chunks(bad), SingleProcess(), step=8, saved_step=4)
    assert len(asked) == 1  # one wait for the device, however many tensors


def test_finite_tensors_are_saved() -> None:
    require_finite_state(chunks(1.0)[:4], SingleProcess(), step=8, saved_step=4)
