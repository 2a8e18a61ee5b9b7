"""Head and loss in chunks of tokens against the logits of all tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from spectral_scale.models import chunked_loss, loss_chunks
from spectral_scale.models.chunked_loss import head_loss_sum
from spectral_scale.models.loss_chunks import chunk_sizes
from spectral_scale.ops.labels import IGNORED_LABEL
from spectral_scale.ops.losses import negative_log_likelihood_sum
from spectral_scale.testing.launches import Launches

BATCH, TOKENS, HIDDEN, WORDS = 3, 7, 5, 11


@pytest.fixture(autouse=True)
def four_tokens_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_chunks, "CHUNK_BYTES", 4 * 4 * WORDS)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return negative_log_likelihood_sum(linear(hidden, weight), labels)


def run(
    loss_of: Any,
    dtype: torch.dtype,
    *,
    autocast: torch.dtype | None = None,
    frozen: bool = False,
    tied: bool = False,
    scale: float = 0.125,
) -> dict[str, Tensor]:
    """The loss and its gradients; `tied`: the weight is the embedding of the hidden states."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WORDS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    hidden = torch.randn(BATCH, TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(WORDS, (BATCH, TOKENS), generator=generator)
    labels[0, 2:5] = IGNORED_LABEL
    labels[2] = IGNORED_LABEL
    weight.requires_grad_(not frozen)
    hidden.requires_grad_()
    given = hidden + torch.nn.functional.embedding(labels.clamp_min(0), weight) if tied else hidden
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_of(given, weight, labels)
    (loss * scale).backward()
    assert hidden.grad is not None
    found = {"loss": loss.detach(), "hidden": hidden.grad}
    return found if weight.grad is None else found | {"weight": weight.grad}


def difference(**options: Any) -> float:
    found, expected = run(head_loss_sum, **options), run(plain, **options)
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        gap = float((found[name] - value).abs().max())
        worst = max(worst, gap / max(1e-30, float(value.abs().max())))
    return worst


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_the_plain_loss_in_fp64(tied: bool, frozen: bool) -> None:
    assert difference(dtype=torch.float64, tied=tied, frozen=frozen) < 1e-13


def test_equals_the_plain_loss_in_fp32() -> None:
    assert difference(dtype=torch.float32) < 1e-6


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_equals_the_plain_loss_under_autocast(autocast: torch.dtype) -> None:
    assert difference(dtype=torch.float32, autocast=autocast, scale=1024.0) < 1e-2


def test_low_precision_weights() -> None:
    assert difference(dtype=torch.bfloat16) < 2e-2


def test_small_gradients_survive_in_fp16() -> None:
    """The loss scale comes before values are rounded: without it the smallest would vanish."""
    options: dict[str, Any] = {"dtype": torch.float32, "autocast": torch.float16}
    reference = run(plain, torch.float32, scale=2.0**-9)
    found = run(head_loss_sum, **options, scale=2.0**-9)
    assert torch.allclose(found["weight"], reference["weight"], rtol=0.05, atol=1e-6)


def test_a_lost_chunk_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the last chunk is left out."""
    chunks = chunked_loss._chunks
    monkeypatch.setattr(chunked_loss, "_chunks", lambda *a: list(chunks(*a))[:3])
    assert difference(dtype=torch.float64) > 1e-3


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    whole = 4 * BATCH * TOKENS * WORDS
    with Launches("cpu") as counted:
        run(head_loss_sum, torch.float32)
    assert counted.largest["_log_softmax"] == counted.largest["exp_"] == 4 * 4 * WORDS
    assert max(counted.largest.values()) < whole
    with Launches("cpu") as counted:
        run(plain, torch.float32)
    assert counted.largest["_log_softmax"] == whole


def test_without_gradients_none_are_computed() -> None:
    hidden, weight = torch.randn(1, 9, HIDDEN), torch.randn(WORDS, HIDDEN).requires_grad_()
    labels = torch.zeros(1, 9, dtype=torch.int64)
    with torch.no_grad(), Launches("cpu") as counted:
        loss = head_loss_sum(hidden, weight, labels)
    assert counted.by_operator["mm"] == 3  # chunks of three tokens, the logits alone
    assert torch.allclose(loss, plain(hidden, weight, labels))


def test_a_second_backward_pass_is_refused() -> None:
    hidden = torch.randn(1, 9, HIDDEN, requires_grad=True)
    loss = head_loss_sum(hidden, torch.randn(WORDS, HIDDEN), torch.zeros(1, 9, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_chunks_are_of_one_size_but_for_one_token() -> None:
    assert chunk_sizes(4, WORDS) == [4]
    assert chunk_sizes(5, WORDS) == [3, 2]
    assert chunk_sizes(21, WORDS) == [4, 4, 4, 3, 3, 3]
    assert chunk_sizes(0, WORDS) == [0]
