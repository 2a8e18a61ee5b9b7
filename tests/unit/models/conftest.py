"""Small models of both families, as plain transformers builds and saves them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
KINDS = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**COMMON, ffn_dim=80, word_embed_proj_dim=48)),
    "opt-post-norm": lambda: OPTForCausalLM(
        OPTConfig(**COMMON, ffn_dim=80, word_embed_proj_dim=32, do_layer_norm_before=False)
    ),
    "llama-gqa": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, intermediate_size=80, num_key_value_heads=2, rope_theta=5000.0)
    ),
    "llama-tied": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, intermediate_size=80, tie_word_embeddings=True)
    ),
}


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """(model in evaluation mode, the folder it was saved to)."""
    torch.manual_seed(1)
    model = KINDS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that differ from 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"
