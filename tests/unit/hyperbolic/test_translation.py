"""The encoder-decoder of hyperbolic points: points, masks, and what methods convert of it."""

import pytest
import torch

from spectral_scale import SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.errors import ConfigError
from spectral_scale.hyperbolic import LorentzTransformer, minkowski

SOURCE = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
TARGET = torch.tensor([[1, 4, 5], [1, 7, 8]])


@pytest.fixture
def model() -> LorentzTransformer:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "heads": 2, "ffn_features": 12, "max_positions": 6, "dropout": 0.0}
    return LorentzTransformer(10, 8, **sizes).double()


def test_what_blocks_pass_on_are_points(model: LorentzTransformer) -> None:
    memory, _ = model.encode(SOURCE)
    assert float((minkowski(memory, memory) + 1).abs().max()) < 1e-9
    assert model(SOURCE, TARGET).shape == (2, 3, 10)
    torch.testing.assert_close(model.words.points, model.target.points)  # the start


def test_nothing_looks_ahead_or_at_padding(model: LorentzTransformer) -> None:
    before = model(SOURCE, TARGET)
    later = TARGET.clone()
    later[:, 2] = 9
    after = model(SOURCE, later)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-6
    shorter = model(SOURCE[:1, :3], TARGET[:1])
    torch.testing.assert_close(shorter, before[:1])
    seen = SOURCE.clone()
    seen[0, 3] = 9  # the twin: a token where the padding was is seen
    assert (model(seen, TARGET)[0] - before[0]).abs().max() > 1e-6


def test_every_matrix_of_the_blocks_is_converted_and_trains(model: LorentzTransformer) -> None:
    before = model(SOURCE, TARGET)
    config = SpectralConfig(spectral_rank=2, steps_per_iteration=2, iteration_warmup_steps=0)
    converted = convert(model, config)
    assert len(converted) == 2 * 6 + 2 * 10  # encoder: 4 + 2; decoder: 8 + 2
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-2, spectral_lr=3e-2))
    controller = SpectralController(model, optimizer, config, bank_dtype=torch.float64)
    torch.testing.assert_close(model(SOURCE, TARGET), before)
    losses = []
    for _ in range(12):
        scores = model(SOURCE, TARGET)[:, :-1]
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), TARGET[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_long_sentences_are_named(model: LorentzTransformer) -> None:
    with pytest.raises(ConfigError, match="7 tokens exceeds max_positions=6"):
        model(torch.ones(1, 7, dtype=torch.int64), TARGET)
