"""The Trainer under DistributedDataParallel: one process' losses, and resume on another number."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale import SpectralConfig
from spectral_scale.parallel.group import leave_group
from spectral_scale.testing.distributed import run_distributed

CONFIG = SpectralConfig(
    spectral_rank=4, steps_per_iteration=2, iterations_per_round=2, iteration_warmup_steps=2
)


def train(world: int, folder: str, resume: str | None) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from spectral_scale.integrations.transformers import attach

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=32))
    drawn = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(
        output_dir=folder, max_steps=5, per_device_train_batch_size=4 // world, use_cpu=True,
        learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, report_to="none",
        train_sampling_strategy="sequential", disable_tqdm=True, save_strategy="steps",
        save_steps=3, ddp_backend="gloo" if world > 1 else None,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": t, "labels": t} for t in drawn],  # type: ignore[arg-type]
    )
    callback = attach(trainer, CONFIG)
    trainer.train(resume_from_checkpoint=resume)
    leave_group()
    history = trainer.state.log_history
    return {
        "losses": [line["loss"] for line in history if "loss" in line],
        "swaps": callback.swaps,
        "owned": len(dict(callback.controller.state_tensors())) if callback.controller else 0,
        "weight": trainer.model.model.norm.weight.detach().numpy(),
    }


def test_two_processes_train_as_one_and_one_goes_on(tmp_path: Path) -> None:
    alone, pair = str(tmp_path / "alone"), str(tmp_path / "pair")
    (expected,) = run_distributed(train, 1, 1, alone, None)
    ranks = run_distributed(train, 2, 2, pair, None)
    assert ranks[0]["losses"] == pytest.approx(expected["losses"], rel=0, abs=1e-5)
    assert [rank["swaps"] for rank in ranks] == [2, 2]
    assert all(0 < rank["owned"] < expected["owned"] for rank in ranks)
    assert (ranks[0]["weight"] == ranks[1]["weight"]).all()
    written = sorted(p.name for p in (tmp_path / "pair" / "checkpoint-3").glob("spectral_*"))
    assert written == [f"spectral_scale-0000{k}-of-00002.safetensors" for k in range(2)]
    (resumed,) = run_distributed(train, 1, 1, pair, str(tmp_path / "pair" / "checkpoint-3"))
    assert resumed["losses"] == pytest.approx(ranks[0]["losses"], rel=0, abs=1e-5)
    assert resumed["swaps"] == 1
