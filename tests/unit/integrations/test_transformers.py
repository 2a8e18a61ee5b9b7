"""The real Trainer against our own loop, and its checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from spectral_scale import FilterConfig, SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.errors import CheckpointError, ConfigError, ResumeMismatchError, SpectralError
from spectral_scale.integrations.transformers import attach
from spectral_scale.methods.layer import factored_layers

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
SST = SpectralConfig(
    spectral_rank=4, steps_per_iteration=2, iterations_per_round=2, iteration_warmup_steps=2
)
STEPS, ACCUMULATION, SEQUENCES = 7, 2, 4


def small_model(family: str = "llama") -> Any:
    torch.manual_seed(0)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    if family == "gpt2":  # its matrices are Conv1D; without dropout, as the others
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts))
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def dataset() -> list[dict[str, Tensor]]:
    drawn = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(3))
    labels = drawn.clone()
    labels[:, 0] = -100  # never predicted; the Trainer would count it in GPT-2's mean
    return [{"input_ids": x, "labels": y} for x, y in zip(drawn, labels, strict=True)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SEQUENCES,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "weight_decay": 0.01,
    }
    return TrainingArguments(**(settings | changes))


def make(folder: Path, spectral: SpectralConfig = SST, **changes: Any) -> tuple[Trainer, Any]:
    """A trainer with a method attached; keywords `attach_...` go to `attach`."""
    given = {k.removeprefix("attach_"): changes.pop(k) for k in list(changes) if "attach_" in k}
    family = changes.pop("family", "llama")
    trainer = Trainer(
        model=small_model(family),
        args=arguments(folder, **changes),
        train_dataset=dataset(),
        eval_dataset=dataset()[:4],
    )
    return trainer, attach(trainer, spectral, **given)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def own_loop(family: str) -> tuple[list[float], int]:
    """What README's loop does, on the batches that the trainer reads: losses, and swaps."""
    model = small_model(family)
    convert(model, SST)
    groups = param_groups(model, lr=3e-3, spectral_lr=3e-3, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    controller = SpectralController(model, optimizer, SST, seed=42)
    data, found, swaps = dataset(), [], 0
    for step in range(STEPS):
        total = 0.0
        for micro in range(ACCUMULATION):
            first = (step * ACCUMULATION + micro) * SEQUENCES
            batch = [data[i % len(data)] for i in range(first, first + SEQUENCES)]
            inputs = {key: torch.stack([b[key] for b in batch]) for key in batch[0]}
            loss = model(**inputs).loss / ACCUMULATION
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        swaps += controller.after_step() is not None
        found.append(total)
    return found, swaps


@pytest.mark.parametrize(("family", "layers"), [("llama", 14), ("qwen3", 14), ("gpt2", 8)])
def test_the_trainer_has_the_losses_of_our_own_loop(
    family: str, layers: int, tmp_path: Path
) -> None:
    trainer, callback = make(tmp_path, family=family)
    trainer.train()
    expected, swaps = own_loop(family)
    assert losses(trainer) == pytest.approx(expected, rel=0, abs=1e-6)
    assert callback.swaps == swaps == 3 == callback.controller.applied_steps // 2
    logged = [line for line in trainer.state.log_history if "spectral/layers" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert {line["spectral/layers"] for line in logged} == {layers}
    # Dense again at the end: an ordinary folder, with the logits of what was trained.
    assert not factored_layers(trainer.model)
    trainer.save_model()
    loaded = type(small_model(family)).from_pretrained(tmp_path)
    inputs = dataset()[0]["input_ids"][None]
    torch.testing.assert_close(loaded(inputs).logits, trainer.model(inputs).logits)


METHODS = {
    "sst": SST,
    "factored": SpectralConfig(spectral_rank=4, steps_per_iteration=2, storage="factored"),
    "tangent": SpectralConfig(form="tangent", spectral_rank=4, steps_per_iteration=2),
    "lora": SpectralConfig(method="lora", spectral_rank=4, train_dense=False),
    "relora": SpectralConfig(method="relora", spectral_rank=4, steps_per_iteration=2),
    "galore": SpectralConfig(method="galore", spectral_rank=4, steps_per_iteration=2),
    "frod": SpectralConfig(method="frod", sparsity=0.05, train_dense=False),
}
EXTRA: dict[str, dict[str, Any]] = {
    "filter": {
        "attach_filter_config": FilterConfig(kind="heat", graph="knn", neighbors=1),
        "max_grad_norm": 0.0,
    },
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("name", [*METHODS, *EXTRA])
def test_resuming_from_a_checkpoint_changes_no_bit(name: str, tmp_path: Path) -> None:
    """Stopped in the middle of an iteration, in a random order, with evaluations and a warm-up."""
    spectral = METHODS.get(name, SST)
    changes = {
        "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2,
        "attach_merge_at_end": False, "train_sampling_strategy": "random", "warmup_steps": 2,
        "lr_scheduler_type": "constant_with_warmup",
    } | EXTRA.get(name, {})  # fmt: skip
    straight, callback = make(tmp_path, spectral, **changes)
    straight.train()
    resumed, again = make(tmp_path, spectral, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(straight)
    before, after = weights(straight.model), weights(resumed.model)
    assert before.keys() == after.keys()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    swapping = name not in ("lora", "frod")
    assert (callback.swaps > again.swaps > 0) == swapping
    if name == "sst":  # back to the checkpoint in the same process, the controller included
        straight.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert losses(straight) == losses(resumed)
        assert callback.controller.applied_steps == STEPS


def saved(folder: Path) -> Path:
    """A checkpoint of step 3."""
    trainer, _ = make(folder, save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train()
    return folder / "checkpoint-3"


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "first")
    (own,) = checkpoint.glob("spectral_scale-*.safetensors")
    # Another method's settings.
    other, _ = make(tmp_path / "first", SpectralConfig(spectral_rank=4, steps_per_iteration=3))
    with pytest.raises(ResumeMismatchError, match="steps_per_iteration"):
        other.train(resume_from_checkpoint=str(checkpoint))
    # A folder elsewhere: found where it is said to be, and not taken for another of that step.
    moved = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, moved)
    lost, _ = make(tmp_path / "second")
    with pytest.raises(CheckpointError, match="resume_from="):
        lost.train(resume_from_checkpoint=str(moved))
    found, callback = make(tmp_path / "second", attach_resume_from=moved)
    found.train(resume_from_checkpoint=str(moved))
    assert callback.controller.applied_steps == STEPS
    # Interrupted between the trainer's files and ours.
    own.unlink()
    broken, _ = make(tmp_path / "first")
    with pytest.raises(CheckpointError, match="saving was interrupted"):
        broken.train(resume_from_checkpoint=str(checkpoint))


def test_state_of_another_step_is_never_combined_with_the_weights(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    state = checkpoint / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(state)
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, state, {"format": "pt"})
    trainer, _ = make(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to other weights"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_merged_model_does_not_train_on(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(SpectralError, match="merged when training ended"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optim": "adafactor"}, "optim=adafactor"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"attach_filter_config": FilterConfig(kind="heat")}, "max_grad_norm=0"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=named):
        make(tmp_path, **changes)


def test_an_own_optimizer_and_a_bf16_model_are_refused(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset(),
        optimizers=(optimizer, None),  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(ConfigError, match="an optimizer of your own"):
        attach(trainer, SST)
    half = Trainer(model=small_model().bfloat16(), args=arguments(tmp_path))
    with pytest.raises(ConfigError, match="dtype=torch.float32"):
        attach(half, SST)
    assert not factored_layers(model)


def test_the_checkpoint_holds_what_the_bank_holds(tmp_path: Path) -> None:
    from safetensors import safe_open

    checkpoint = saved(tmp_path)
    with safe_open(checkpoint / "spectral_scale-00000-of-00001.safetensors", "pt") as opened:
        names, metadata = list(opened.keys()), opened.metadata()
    assert sum(name.endswith("/sigma") for name in names) == 14
    assert metadata["applied_steps"] == "3"
    assert json.loads(metadata["settings"])["spectral.spectral_rank"] == 4


def test_the_example_runs(tmp_path: Path) -> None:
    import runpy

    main = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "trainer.py"))["main"]
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "max_steps": STEPS, "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = main(
        LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64})), dataset(), **settings
    )
    assert trainer.state.global_step == STEPS
    assert not factored_layers(LlamaForCausalLM.from_pretrained(tmp_path))
