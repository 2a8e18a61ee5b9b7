"""The examples of docs/megatron.md in a Megatron user's own script, at several layouts."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale.testing.distributed import run_distributed

PAGE = (Path(__file__).parents[2] / "docs" / "megatron.md").read_text(encoding="utf-8")
CONVERT, SPEC = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
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


def script(tensor: int, *, from_spec: bool) -> list[float]:
    """Run the examples; the losses. Ranks of other copies see the same batch."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    names = setting(tensor, from_spec and tensor > 1)
    convert = CONVERT.replace("=200)", "=3, iterations_per_round=1)")
    torch.manual_seed(0)
    if from_spec:
        exec(SPEC.replace("=200)", "=3, iterations_per_round=1)"), names)
        convert = convert.replace("convert_gpt(gpt, config)\n", "")
        convert = convert.replace("store.initial_weights()", "weights")
    else:
        names["gpt"] = GPTModel(
            names["transformer_config"], get_gpt_layer_local_spec(), 128, max_sequence_length=16
        )
    losses: list[float] = []

    class Watched(list[Any]):
        def __iter__(self) -> Any:
            for tokens, positions, labels in list.__iter__(self):
                with torch.no_grad():
                    model = names["model"]
                    losses.append(float(model(tokens, positions, None, labels=labels).mean()))
                yield tokens, positions, labels

    names["batches"] = Watched(names["batches"])
    exec(convert, names)
    assert names["controller"].applied_steps == STEPS
    parallel_state.destroy_model_parallel()
    return losses


def work() -> list[list[float]]:
    from spectral_scale.testing.megatron import run_on_cpu

    run_on_cpu()
    torch.distributed.init_process_group("gloo")
    found = [script(t, from_spec=spec) for spec in (False, True) for t in (1, 2)]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def test_examples_train_alike_at_every_layout() -> None:
    """TP 1 x DP 2 with the distributed optimizer, and TP 2 (with sequence parallelism where the
    spec allows it), over two swaps that are re-decompositions."""
    for converted, converted_tp2, built, built_tp2 in run_distributed(work, 2, timeout_seconds=120):
        assert converted == pytest.approx(converted_tp2, abs=1e-5)
        assert built == pytest.approx(built_tp2, abs=1e-5)
        assert converted[-1] < converted[0] - 0.1
        assert built[-1] < built[0] - 0.1


def test_the_example_is_short() -> None:
    setup, loop = CONVERT.split("config =", 1)[1].split("for tokens")
    statements = re.findall(r"^\S[^\n]*[^(\s]$", "config =" + setup, flags=re.MULTILINE)
    assert len(statements) <= 10
    assert "controller.after_step()" in loop
