"""megatron-core's GPTModel with transformers' weights says what the transformers model says."""

from typing import Any

import pytest

from spectral_scale.testing.distributed import run_distributed

pytest.importorskip("megatron.core")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 101,
    "max_position_embeddings": 40,
}
HEADS = {"num_attention_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "opt": {"kind": "opt", **SIZES, **HEADS, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "llama-gqa": {
        **{"kind": "llama", **SIZES, **HEADS, "num_key_value_heads": 4},
        **{"intermediate_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 5000.0},
    },
    "llama-tied": {
        **{"kind": "llama", **SIZES, **HEADS, "intermediate_size": 96},
        "tie_word_embeddings": True,
    },
}


def transformers_model(kind: str, **sizes: Any) -> Any:
    """A plain transformers model whose every weight counts, biases and norms included."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(1)
    if kind == "opt":
        model: Any = OPTForCausalLM(OPTConfig(**sizes, dropout=0.0, pad_token_id=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gpt_with_weights(model: Any, parts: int, faulty: str = "") -> tuple[Any, Any]:
    """(the GPTModel of this rank, its weight map)."""
    from megatron.core import parallel_state

    from spectral_scale.backends.megatron.gpt_config import megatron_settings
    from spectral_scale.backends.megatron.gpt_model import build_gpt_model
    from spectral_scale.backends.megatron.gpt_state import load_weights, state_reader
    from spectral_scale.backends.megatron.gpt_weights import megatron_weights

    settings = megatron_settings(model.config, tensor_parallel=parts, pad_vocabulary=True)
    gpt: Any = build_gpt_model(settings).eval()
    weights = megatron_weights(
        settings.architecture,
        parts=parts,
        index=parallel_state.get_tensor_model_parallel_rank(),
        padded_vocab_size=settings.padded_vocab_size,
    )
    state = dict(model.named_parameters())
    if faulty == "positions" and settings.architecture.family == "opt":
        gpt.embedding.position_embeddings.offset = 0
    if faulty == "fused order":
        q = next(n for n in state if n.endswith("q_proj.weight"))
        state[q] = state[q].roll(8, 0)
    load_weights(gpt, weights, state_reader(state))
    return gpt, weights


def compare(parts: int, names: list[str], faulty: str = "") -> dict[str, tuple[float, float, Any]]:
    """Largest differences of logits and of the loss, and this rank's weights, by model."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=parts)
    model_parallel_cuda_manual_seed(1)
    tokens = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(5))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(32).expand(2, -1).contiguous()
    found = {}
    for name in names:
        model = transformers_model(**MODELS[name])
        gpt, _ = gpt_with_weights(model, parts, faulty)
        with torch.no_grad():
            expected = model(inputs).logits
            logits = gpt(inputs, positions, None, runtime_gather_output=True)
            loss = gpt(inputs, positions, None, labels=labels).mean()
        flat = expected.reshape(-1, 101), labels.reshape(-1)
        gap = (logits[..., :101] - expected).abs().max()
        assert logits.shape[-1] == 101 + -101 % parts
        assert bool((logits[..., 101:] < -1e30).all())
        loss_gap = (loss - torch.nn.functional.cross_entropy(*flat)).abs()
        held = {fqn: p.detach().numpy() for fqn, p in gpt.named_parameters()}
        found[name] = float(gap), float(loss_gap), held
    parallel_state.destroy_model_parallel()
    return found


def measure() -> dict[str, dict[str, tuple[float, float, Any]]]:
    import torch.distributed as dist

    from spectral_scale.testing.megatron import run_on_cpu

    run_on_cpu()
    dist.init_process_group("gloo")
    found = {f"tp{parts}": compare(parts, list(MODELS)) for parts in (1, 2, 4)}
    found["positions"] = compare(2, ["opt"], "positions")
    found["fused order"] = compare(2, ["llama-gqa"], "fused order")
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, tuple[float, float, Any]]]]:
    return run_distributed(measure, 4, timeout_seconds=200)


def test_logits_and_losses_equal_those_of_transformers(ranks: list[dict[str, Any]]) -> None:
    """TP 1, 2 and 4, a vocabulary of 101 padded to a multiple; two faults are seen."""
    for rank in ranks:
        for parts in ("tp1", "tp2", "tp4"):
            for name, (logits, loss, _) in rank[parts].items():
                assert logits < 1e-5, (parts, name)
                assert loss < 1e-5, (parts, name)
        for fault in ("positions", "fused order"):
            assert all(logits > 1e-3 for logits, _, _ in rank[fault].values()), fault


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_for_bit(name: str, ranks: list[dict[str, Any]]) -> None:
    """From transformers to the GPTModels of two or four ranks, and back."""
    import torch

    from spectral_scale.backends.megatron.gpt_config import megatron_settings
    from spectral_scale.backends.megatron.gpt_state import to_transformers
    from spectral_scale.backends.megatron.gpt_weights import megatron_weights

    model = transformers_model(**MODELS[name])
    for parts in (2, 4):
        settings = megatron_settings(model.config, tensor_parallel=parts, pad_vocabulary=True)
        padded = settings.padded_vocab_size
        maps = [
            megatron_weights(settings.architecture, parts=parts, index=i, padded_vocab_size=padded)
            for i in range(parts)
        ]
        held = [
            {fqn: torch.from_numpy(array) for fqn, array in rank[f"tp{parts}"][name][2].items()}
            for rank in ranks[:parts]
        ]
        back = to_transformers(list(zip(maps, held, strict=True)))
        expected = dict(model.named_parameters())
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[n], expected[n]) for n in back)
