"""The Trainer killed by SIGKILL, and gone on with in a fresh process: not a bit is different."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale import SpectralConfig
from spectral_scale.testing.distributed import RankError, run_distributed

STEPS, SAVED, KILLED = 7, 3, 5  # swaps after 2, 4 and 6: saved inside an iteration
CONFIG = SpectralConfig(
    spectral_rank=4, steps_per_iteration=2, iterations_per_round=2, iteration_warmup_steps=2
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "qwen3": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
    },
}


def train(family: str, folder: str, resume: bool, dies: bool) -> dict[str, Any]:
    """Train in this process, which kills itself in the midst if it is to die."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from spectral_scale.integrations.transformers import attach

    class Killer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if dies and state.global_step == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=32, **FAMILIES[family])
    drawn = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True,
        learning_rate=3e-3, logging_steps=1, report_to="none", disable_tqdm=True,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=SAVED,
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=arguments,
        train_dataset=[{"input_ids": t, "labels": t} for t in drawn],  # type: ignore[arg-type]
        callbacks=[Killer()],
    )
    attach(trainer, CONFIG)
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: p.detach().numpy() for n, p in trainer.model.named_parameters()}
    losses = {x["step"]: x["loss"] for x in trainer.state.log_history if "loss" in x}
    return {"weights": weights, "losses": losses}


def test_a_killed_trainer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """GPT-2, whose matrices are Conv1D and which has dropout, and Qwen3."""
    for family in FAMILIES:
        straight, killed = str(tmp_path / f"{family}_a"), str(tmp_path / f"{family}_b")
        (expected,) = run_distributed(train, 1, family, straight, False, False)
        with pytest.raises(RankError, match="exit code -9"):
            run_distributed(train, 1, family, killed, False, True)
        (found,) = run_distributed(train, 1, family, killed, True, False)
        assert found["losses"] == expected["losses"] and len(expected["losses"]) == STEPS
        for name, value in expected["weights"].items():
            assert (found["weights"][name] == value).all(), name
