"""The comparison passes rounding, and nothing that is more than rounding."""

import math

import pytest
import torch
from torch import nn

from spectral_scale.artifacts.compare import (
    RELATIVE_TOLERANCE,
    compare_logits,
    comparison_ids,
    compute_logits,
    require_same,
)
from spectral_scale.errors import SpectralScaleError


def logits() -> torch.Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 4


def test_rounding_passes() -> None:
    reference = logits()
    found = compare_logits(reference, reference * (1 + 2**-22))
    assert 0 < found.max_abs < 1e-5 and found.positions == 10
    assert found.largest == reference.abs().max()
    require_same(found, "same")


@pytest.mark.parametrize("share", [1.5, 100.0])
def test_one_wrong_logit_fails(share: float) -> None:
    reference = logits()
    wrong = reference.clone()
    wrong[1, 4, 6] += share * RELATIVE_TOLERANCE * reference.abs().max()
    with pytest.raises(SpectralScaleError, match="the folder: logits differ by up to"):
        require_same(compare_logits(reference, wrong), "the folder")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_not_finite_never_pass(value: float, side: int) -> None:
    pair = [logits(), logits()]
    pair[side][0, 0, 0] = value
    assert not compare_logits(*pair).within
    both = logits()
    both[0, 0, 0] = value
    assert not compare_logits(both, both.clone()).within


def test_random_ids_are_fixed_and_within_the_vocabulary() -> None:
    ids = comparison_ids(None, sequence_length=16, vocab_size=5)
    assert ids.shape == (4, 16) and set(ids.flatten().tolist()) == set(range(5))
    assert torch.equal(ids, comparison_ids(None, sequence_length=16, vocab_size=5))
    assert comparison_ids(None, sequence_length=2048, vocab_size=5).shape == (1, 2048)


def test_a_model_is_left_in_its_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 3)
            self.dropout = nn.Dropout(0.5)

        def forward(self, input_ids: torch.Tensor) -> "Model":
            self.logits = self.dropout(self.table(input_ids))
            return self

    model = Model().train()
    ids = comparison_ids(None, sequence_length=4, vocab_size=9)
    found = compute_logits(model, ids)
    assert model.training
    assert torch.equal(found, model.table.weight.detach()[ids])  # no dropout took place
