"""Fused attention on megatron-core says what its plain products say, and keeps no scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import save_tiny_llama, tiny_config

MEGATRON = {"parallel__backend": "megatron", "parallel__tensor_parallel": 2}
SEQUENCE, LAYERS = 64, 2
SCORES = 4 * 2 * 2 * SEQUENCE**2 * LAYERS
"""Bytes of the scores that one of two ranks keeps at least: fp32, two sequences, two heads (of
OPT's four), all pairs of tokens, in each layer."""


def compare(configs: dict[str, Any]) -> dict[str, Any]:
    """Of each run: logits, bytes saved in the forward pass, layers whose attention is fused, and
    what is said of a mask."""
    import torch

    from spectral_scale.backends.megatron.attention import FusedAttention
    from spectral_scale.errors import SpectralError
    from spectral_scale.parallel.rank_info import detect_rank_info
    from spectral_scale.supervision.run_folder import create_run_folder
    from spectral_scale.testing.megatron import megatron_in_one_group
    from spectral_scale.testing.memory import saved_bytes
    from spectral_scale.testing.tiny import build_from_config

    found: dict[str, Any] = {}
    with megatron_in_one_group():
        for name, config in configs.items():
            create_run_folder(Path(config.train.run_dir))
            run = build_from_config(config, detect_rank_info())
            tokens = torch.arange(2 * SEQUENCE).view(2, SEQUENCE) % 97
            with saved_bytes(run.model) as saved:
                logits = run.forward(input_ids=tokens).logits
            fused = [m for m in run.forward.modules() if isinstance(m, FusedAttention)]
            found[name] = {"logits": logits.detach().numpy(), "saved": saved(), "fused": len(fused)}
            for module in fused[:1]:
                query = torch.zeros(SEQUENCE, 2, 2, 16)
                with pytest.raises(SpectralError, match="takes no mask, bias or packing"):
                    module(query, query, query, torch.ones(1, dtype=torch.bool))
            run.backend.close()
    return found


def test_fused_attention_is_the_plain_one(corpus: Path, tmp_path: Path) -> None:
    opt = {"model__hidden_size": 64, "model__num_heads": 4}
    models = {"opt": opt, "grouped": save_tiny_llama(tmp_path / "llama", corpus)}
    configs = {
        f"{name} {kind}": tiny_config(
            corpus,
            tmp_path / f"{name} {kind}",
            model__attention=kind,
            model__sequence_length=SEQUENCE,
            **MEGATRON,
            **changes,
        )
        for name, changes in models.items()
        for kind in ("sdpa", "eager")
    }
    for rank in run_distributed(compare, 2, configs):
        for name in models:
            fused, plain = rank[f"{name} sdpa"], rank[f"{name} eager"]
            assert (fused["fused"], plain["fused"]) == (LAYERS, 0)
            assert np.abs(fused["logits"] - plain["logits"]).max() < 1e-5
            assert plain["logits"].std() > 0.01
            assert plain["saved"] - fused["saved"] > 0.9 * SCORES
