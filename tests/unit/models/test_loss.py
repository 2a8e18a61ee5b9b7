"""Where the logits of all tokens would be large, a model's head sums the loss itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import ModelConfig
from spectral_scale.models import chunked_loss, loss_chunks
from spectral_scale.models import loss as model_loss
from spectral_scale.models.build import build_model, materialise
from spectral_scale.models.loss import plain_head, token_loss_sum

WORDS = 40


def model_of(family: str) -> Any:
    architecture = Architecture(
        family=family, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_size=32,
        vocab_size=WORDS, max_positions=32, embedding_size=16, tied_embeddings=family == "opt",
    )  # fmt: skip
    model = build_model(architecture, ModelConfig(), eos_token_id=0)
    materialise(model, device=torch.device("cpu"), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    ids = torch.randint(WORDS, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[1, 3:] = -100
    model.zero_grad()
    loss = token_loss_sum(model, ids, labels)
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.clone() for g in found)]


class Wrapped(nn.Module):
    """Hides the model as DistributedDataParallel and DeepSpeed's engine do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_chunks_change_neither_loss_nor_gradients(
    family: str, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    expected = loss_and_gradients(model)
    monkeypatch.setattr(loss_chunks, "CHUNK_BYTES", 4 * 5 * WORDS)
    called = []
    monkeypatch.setattr(
        model_loss,
        "head_loss_sum",
        lambda *a: (called.append(1), chunked_loss.head_loss_sum(*a))[1],
    )
    found = loss_and_gradients(wrap(model))
    assert called == [1]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    logits = model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits
    assert logits.shape == (1, 3, WORDS), "the head must give logits again"


def test_one_chunk_is_the_plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what it was, since nothing of it is touched."""
    monkeypatch.setattr(model_loss, "head_loss_sum", None)
    loss_and_gradients(model_of("opt"))


def test_the_head_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(loss_chunks, "CHUNK_BYTES", 4 * WORDS)
    ids = torch.full((2, 9), WORDS)  # no such word
    with pytest.raises(IndexError):
        token_loss_sum(model, ids, ids)
    assert "forward" not in vars(plain_head(model))


def test_a_head_that_is_no_plain_linear_gives_all_logits() -> None:
    model = model_of("llama")
    model.set_output_embeddings(nn.Linear(16, WORDS, bias=True))
    assert plain_head(model) is None
    assert plain_head(nn.Linear(2, 2)) is None
