"""What a forward pass leaves out on GPUs: float cumulative sums, and questions to the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import ModelConfig
from spectral_scale.errors import SpectralError
from spectral_scale.models.attention import CAUSAL_SDPA, choose_attention, uses_fused_attention
from spectral_scale.models.build import build_model, materialise

CPU = torch.device("cpu")
SHAPES: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_size": 32,
    "vocab_size": 40, "max_positions": 32, "embedding_size": 16,
}  # fmt: skip
OPT = Architecture(family="opt", tied_embeddings=True, **SHAPES)
LLAMA = Architecture(family="llama", tied_embeddings=False, **(SHAPES | {"num_kv_heads": 1}))
each_architecture = pytest.mark.parametrize("architecture", [OPT, LLAMA], ids=["opt", "llama"])


class Watch(TorchDispatchMode):
    """Counts reads of device values by the host, and cumulative sums of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.float_sums = 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        self.reads += any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero"))
        self.float_sums += "cumsum" in name and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


def make(architecture: Architecture, attention: str = "sdpa") -> PreTrainedModel:
    config = ModelConfig(attention=attention)  # type: ignore[arg-type]
    model = build_model(architecture, config, eos_token_id=0)
    choose_attention(model, config, device=CPU, precision="fp32")
    materialise(model, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def without_help(model: PreTrainedModel) -> PreTrainedModel:
    """As transformers would run the same weights."""
    model.set_attn_implementation("sdpa")
    model.get_decoder()._forward_pre_hooks.clear()
    return model


def ids() -> torch.Tensor:
    return torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(1))


def results(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Logits, and every gradient."""
    logits = model(input_ids=ids()).logits
    logits.logsumexp(-1).sum().backward()
    yield logits
    for parameter in model.parameters():
        assert parameter.grad is not None
        yield parameter.grad


@each_architecture
def test_nothing_is_asked_of_the_device(architecture: Architecture) -> None:
    with Watch() as watch:
        model = make(architecture)
        model(input_ids=ids()).logits.sum().backward()
    assert (watch.reads, watch.float_sums) == (0, 0)


def test_transformers_would_ask() -> None:
    """The twins: the read that LLaMA makes, and the sum that has no deterministic form in OPT."""
    with Watch() as watch:
        without_help(make(LLAMA))(input_ids=ids())
    assert watch.reads == 1
    with Watch() as watch:
        without_help(make(OPT))(input_ids=ids())
    assert watch.float_sums == 1


@each_architecture
def test_results_are_the_same_to_the_bit(architecture: Architecture) -> None:
    found, expected = results(make(architecture)), results(without_help(make(architecture)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@each_architecture
def test_a_mask_is_refused_where_it_would_be_ignored(architecture: Architecture) -> None:
    model = make(architecture)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    assert model.config._attn_implementation == CAUSAL_SDPA and uses_fused_attention(model)
    with pytest.raises(SpectralError, match=r"set_attn_implementation\('sdpa'\)"):
        model(input_ids=ids(), attention_mask=mask)
    model.set_attn_implementation("sdpa")
    padded = model(input_ids=ids(), attention_mask=mask).logits
    assert not torch.equal(padded[0, 4:], model(input_ids=ids()).logits[0, 4:])
    assert not uses_fused_attention(make(architecture, "eager"))
