"""The examples of docs/megatron.md in a Megatron user's own script, at several layouts."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale.testing.distributed import run_distributed

PAGE = (Path(__file__).parents[2] / "docs" / "megatron.md").read_text(encoding="utf-8")
CONVERT, SPEC, PRETRAINED = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
STEPS = 8


def setting(tensor: int, sequence_parallel: bool) -> dict[str, Any]:
    """What such a script has before: parallel state, configurations, data."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence_parallel,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )
    tokens = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand_as(tokens)
    return {
        "transformer_config": config,
        "ddp_config": DistributedDataParallelConfig(use_distributed_optimizer=tensor == 1),
        "batches": [(tokens, positions, tokens)] * STEPS,
    }


def dense_gpt(names: dict[str, Any]) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(0)
    config = names["transformer_config"]
    return GPTModel(config, get_gpt_layer_local_spec(), 128, max_sequence_length=16)


def script(
    tensor: int, *, from_spec: bool, steps: int = STEPS, saved: dict[str, Any] | None = None
) -> tuple[list[float], dict[str, Any]]:
    """Run the examples; losses (ranks of other copies see the same batch) and names afterwards.

    Args:
        tensor: tensor-parallel size.
        from_spec: by the second example instead of conversion.
        steps: to take.
        saved: what `state` gave, to go on from.
    """
    names = setting(tensor, from_spec and tensor > 1)
    short = "=3, iterations_per_round=1)"
    convert = CONVERT.replace("=200)", short)
    if from_spec:
        exec(SPEC.replace("=200)", short), names)
        convert = convert.replace("convert_gpt(gpt, config)\n", "")
        convert = convert.replace("store.initial_weights()", "weights")
    else:
        names["gpt"] = dense_gpt(names)
    if saved is not None:
        convert = convert.replace("weights=store.initial_weights()", "decompose=False")
        convert = convert.replace("for tokens", "load(gpt, optimizer, controller)\nfor tokens")
        names["load"] = partial(load, saved)
    losses: list[float] = []

    class Watched(list[Any]):
        def __iter__(self) -> Any:
            for tokens, positions, labels in list.__iter__(self):
                losses.append(loss(names["model"], tokens, positions, labels))
                yield tokens, positions, labels

    names["batches"] = Watched(names["batches"][:steps])
    exec(convert, names)
    assert names["controller"].applied_steps == steps + (saved or {"steps": 0})["steps"]
    return losses, names


@torch.no_grad()
def loss(model: Any, tokens: Any, positions: Any, labels: Any) -> float:
    return float(model(tokens, positions, None, labels=labels).mean())


def state(names: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of such a script holds, of this rank."""
    controller = names["controller"]
    saved = {
        "model": names["gpt"].state_dict(),
        "optimizer": names["optimizer"].optimizer.state_dict(),
        "controller": dict(controller.state_tensors()),
        "steps": controller.applied_steps,
    }
    return copy.deepcopy(saved)


def load(saved: dict[str, Any], gpt: Any, optimizer: Any, controller: Any) -> None:
    gpt.load_state_dict(saved["model"])
    optimizer.optimizer.load_state_dict(saved["optimizer"])
    controller.load_state(saved["controller"].__getitem__, saved["steps"])


def merged(names: dict[str, Any]) -> float:
    """By how much the loss changes when spectral layers become dense ones."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from spectral_scale import merge
    from spectral_scale.errors import SpectralError
    from spectral_scale.megatron import merge_gpt

    gpt, batch = names["gpt"], list.__getitem__(names["batches"], 0)
    before = loss(gpt, *batch)
    with pytest.raises(SpectralError, match=r"spectral_scale\.megatron\.merge_gpt"):
        merge(gpt)
    assert merge_gpt(gpt) == 2 * 4
    linears = [m for n, m in gpt.named_modules() if n.rpartition(".")[2].startswith("linear_")]
    assert {type(m) for m in linears} == {ColumnParallelLinear, RowParallelLinear}
    return abs(loss(gpt, *batch) - before)


def there_and_back() -> float:
    """Largest change of a transformers model's weight by conversion and merging, at TP 2."""
    from megatron.core import parallel_state
    from transformers import LlamaConfig, LlamaForCausalLM

    from spectral_scale import SpectralConfig, SpectralController
    from spectral_scale.backends.megatron.gpt_state import to_megatron
    from spectral_scale.megatron import MegatronStore, convert_gpt, merge_gpt

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    names: dict[str, Any] = {
        "pretrained": LlamaForCausalLM(LlamaConfig(**sizes, **heads)),
        "tensor_group": parallel_state.get_tensor_model_parallel_group(),
    }
    exec(PRETRAINED, names)
    gpt, config = names["gpt"], SpectralConfig(spectral_rank=4)
    convert_gpt(gpt, config)
    store = MegatronStore(gpt, None)
    SpectralController(gpt, None, config, store=store, weights=store.initial_weights())
    assert merge_gpt(gpt) == 4
    expected = to_megatron(names["weights"], names["pretrained"].state_dict())
    found = dict(gpt.named_parameters())
    assert found.keys() == expected.keys()
    return max(float((found[n].detach() - expected[n]).abs().max()) for n in expected)


def scheduled(names: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each group after warm-up by Megatron's scheduler."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from spectral_scale.megatron import spectral_optimizer

    optimizer = spectral_optimizer(names["model"], lr=1e-3, spectral_lr=5e-4, weight_decay=0.1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=0.0,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(2)
    return {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}


def work() -> dict[str, Any]:
    from megatron.core import parallel_state

    from spectral_scale.testing.megatron import run_on_cpu

    run_on_cpu()
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {"merged": []}
    for kind, spec in (("converted", False), ("built", True)):
        for tensor in (1, 2):
            found[f"{kind} tp{tensor}"], names = script(tensor, from_spec=spec)
            found["merged"].append(merged(names))
            if (kind, tensor) == ("converted", 2):
                found["there and back"] = there_and_back()
            parallel_state.destroy_model_parallel()
    for tensor in (1, 2):
        first, names = script(tensor, from_spec=False, steps=4)
        saved = state(names)
        found["scheduled"] = scheduled(names)
        parallel_state.destroy_model_parallel()
        second, _ = script(tensor, from_spec=False, steps=STEPS - 4, saved=saved)
        parallel_state.destroy_model_parallel()
        found[f"two parts tp{tensor}"] = first + second
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(work, 2, timeout_seconds=120)


def test_examples_train_alike_at_every_layout(ranks: list[dict[str, Any]]) -> None:
    """TP 1 x DP 2 with the distributed optimizer, and TP 2 (with sequence parallelism where the
    spec allows it), over two swaps that are re-decompositions."""
    for found in ranks:
        for kind in ("converted", "built"):
            alone, shared = found[f"{kind} tp1"], found[f"{kind} tp2"]
            assert alone == pytest.approx(shared, abs=1e-5)
            assert alone[-1] < alone[0] - 0.1


def test_a_script_goes_on_from_what_it_saved(ranks: list[dict[str, Any]]) -> None:
    """Inside an iteration, with moments, active triplets and schedule, bit for bit."""
    for found in ranks:
        for tensor in ("tp1", "tp2"):
            assert found[f"two parts {tensor}"] == found[f"converted {tensor}"]


def test_megatrons_scheduler_knows_the_groups(ranks: list[dict[str, Any]]) -> None:
    """At its peak: learning rates as asked for, and decay of dense matrices only."""
    assert ranks[0]["scheduled"] == {
        "dense": (1e-3, 0.1),
        "dense_no_decay": (1e-3, 0.0),
        "spectral_direction": (5e-4, 0.0),
        "spectral_value": (5e-4, 0.0),
    }


def test_merged_layers_compute_the_same(ranks: list[dict[str, Any]]) -> None:
    """At both sizes and from both examples; pretrained weights come back through triplets."""
    for found in ranks:
        assert max(found["merged"]) < 1e-5
        assert found["there and back"] < 1e-6


def test_the_example_is_short() -> None:
    setup, loop = CONVERT.split("config =", 1)[1].split("for tokens")
    statements = re.findall(r"^\S[^\n]*[^(\s]$", "config =" + setup, flags=re.MULTILINE)
    assert len(statements) <= 10
    assert "controller.after_step()" in loop
