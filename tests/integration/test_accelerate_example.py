"""examples/accelerate_loop.py with the real accelerate: it learns, and resumes bit for bit."""

import runpy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


def started(seed: int = 0) -> tuple[Any, Accelerator, Any]:
    """The prepared parts, their accelerator, and the example's functions."""
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=64))
    drawn = torch.randint(0, 64, (48, 16), generator=torch.Generator().manual_seed(3))
    loader: Any = DataLoader([{"input_ids": t, "labels": t} for t in drawn], batch_size=4)  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    return example["prepare"](model, loader, accelerator), accelerator, example["train"]


def test_the_example_learns_and_resumes(tmp_path: Path) -> None:
    parts, accelerator, train = started()
    first = train(parts, accelerator)
    accelerator.save_state(str(tmp_path))
    assert parts[3].applied_steps == 6
    expected = train(parts, accelerator)
    assert expected[-1] < first[0]
    again, other, train = started(seed=1)
    other.load_state(str(tmp_path))
    assert again[3].applied_steps == 6
    assert train(again, other) == expected
    assert again[3].applied_steps == 12
