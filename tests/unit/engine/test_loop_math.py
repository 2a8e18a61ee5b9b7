"""What a step computes, against the same computation written out with plain transformers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_scale.config.schema import RunConfig
from spectral_scale.data.prepare import prepare
from spectral_scale.data.tokens import open_tokens
from spectral_scale.engine.build import Run
from spectral_scale.engine.evaluate import evaluate
from spectral_scale.parallel.rank_info import RankInfo, detect_rank_info
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import build_from_config, tiny_config, train_tiny

EXACT = {"train__precision": "fp64", "train__steps": 6}  # a swap after step 4


def built(config: RunConfig) -> Run:
    Path(config.train.run_dir).mkdir(parents=True, exist_ok=True)
    return build_from_config(config, RankInfo())


def all_tokens(config: RunConfig, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels (G, S) of a step's whole global batch."""
    loader = built(config).loader
    tokens = open_tokens(config.data.train)
    length = config.model.sequence_length
    rows = [tokens.read(i * length, (i + 1) * length + 1) for i in loader.sample_ids(step)]
    batch = torch.from_numpy(np.stack(rows))
    return batch[:, :-1], batch[:, 1:]


@pytest.mark.parametrize("method", ["full", "sst"])
def test_accumulation_changes_nothing(corpus: Path, tmp_path: Path, method: str) -> None:
    """Micro-batches of 1, 2, 4 and 12 of a global batch of 12: the same losses and gradients."""
    found = {}
    for micro in (1, 2, 4, 12):
        changes = EXACT | {"train__micro_batch_size": micro, "spectral__method": method}
        config = tiny_config(corpus, tmp_path / str(micro), **changes)
        lines = train_tiny(config)["lines"]
        found[micro] = [
            (values["train/loss"], values["train/grad_norm"]) for _, values in lines[1:]
        ]
    assert len(found[12]) == 6
    for micro in (1, 2, 4):
        np.testing.assert_allclose(found[micro], found[12], rtol=0, atol=1e-9)
    assert len({loss for loss, _ in found[12]}) == 6


def test_loss_and_gradient_are_means_over_all_tokens(corpus: Path, tmp_path: Path) -> None:
    """The first step against one backward pass of the plain model over the whole batch."""
    config = tiny_config(corpus, tmp_path, **EXACT, spectral__method="full")
    inputs, labels = all_tokens(config, step=0)
    assert inputs.shape == (12, 32)
    run = built(config)
    logits = run.model(input_ids=inputs).logits
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    loss.backward()
    expected = loss.item()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in run.model.parameters()))
    first = train_tiny(config)["lines"][1][1]
    assert first["train/loss"] == pytest.approx(expected, abs=1e-10)
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-8)
    assert first["train/grad_norm/dense"] == pytest.approx(norm, rel=1e-8)
    assert first["train/perplexity"] == pytest.approx(math.exp(expected))
    assert first["train/tokens"] == 12 * 32


def test_each_step_reads_its_own_batch(corpus: Path, tmp_path: Path) -> None:
    """With all rates at 0 the weights stay, and each loss is that of its step's samples."""
    rates = {"optimizer__lr": 0.0, "spectral__method": "full"}
    config = tiny_config(corpus, tmp_path, **EXACT, **rates)
    losses = train_tiny(config)["losses"]
    model = built(config).model
    for step in (0, 1, 5):
        inputs, labels = all_tokens(config, step)
        with torch.no_grad():
            logits = model(input_ids=inputs).logits
        expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        assert losses[step + 1] == pytest.approx(float(expected), abs=1e-10)


def evaluate_fresh(config: RunConfig) -> tuple[float, int, int]:
    """(loss, tokens, sequences of this rank) of an untrained model; for several processes."""
    run = build_from_config(config, detect_rank_info())
    assert run.validation is not None
    result = evaluate(
        run.model,
        run.validation,
        device=run.backend.device,
        collective=run.backend.collective,
        autocast=None,
    )
    own = len(run.validation.rank_sample_ids)
    run.backend.close()
    return result.loss, result.tokens, own


def test_evaluation_is_the_mean_over_tokens(corpus: Path, tmp_path: Path) -> None:
    """Every sequence of the folder, its short last one included, weighted by tokens."""
    config = tiny_config(corpus, tmp_path, **EXACT, data__validation_sequences=100_000)
    loss, tokens, sequences = evaluate_fresh(config)
    folder = open_tokens(corpus / "valid")
    assert tokens == folder.num_tokens - 1
    assert sequences == -(-tokens // 32) and tokens % 32  # the last one is short
    model = built(config).model.eval()
    total = 0.0
    for start in range(0, tokens, 32):
        row = torch.from_numpy(folder.read(start, min(start + 33, folder.num_tokens)))
        with torch.no_grad():
            logits = model(input_ids=row[None, :-1]).logits[0]
        total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    assert loss == pytest.approx(total / tokens, abs=1e-9)


@pytest.mark.parametrize("sequences", [2, 7])
def test_evaluation_is_the_same_over_ranks(corpus: Path, tmp_path: Path, sequences: int) -> None:
    """Three ranks, one of which has no sequence of two; all take part in every forward pass."""
    config = tiny_config(corpus, tmp_path, **EXACT, data__validation_sequences=sequences)
    alone = evaluate_fresh(config)
    many = run_distributed(evaluate_fresh, 3, config)
    assert [own for *_, own in many] == {2: [0, 1, 1], 7: [2, 2, 3]}[sequences]
    for loss, tokens, _ in many:
        assert tokens == alone[1]
        assert loss == pytest.approx(alone[0], abs=1e-12)


def test_dropout_is_keyed_by_step(corpus: Path, tmp_path: Path) -> None:
    """The same losses whatever the generator held before; others without dropout."""

    def losses(name: str, rate: float) -> list[float]:
        config = tiny_config(corpus, tmp_path / name, model__dropout=rate, **EXACT)
        torch.manual_seed(len(name))
        return list(train_tiny(config)["losses"].values())

    first = losses("a", 0.2)
    assert losses("bb", 0.2) == first
    assert losses("ccc", 0.0)[0] != first[0]


def test_dropout_masks_differ_between_steps(corpus: Path, tmp_path: Path) -> None:
    """One sample that is read in every step: without learning only the masks can differ."""
    text = tmp_path / "short.txt"
    text.write_text("a few words that make one sample. " * 6)
    tokenizer = corpus / "train" / "tokenizer"
    prepare([text], tmp_path / "short", tokenizer=tokenizer, progress=False)
    changes = {
        "data__train": tmp_path / "short",
        "data__validation": "null",
        "model__sequence_length": 64,
        "optimizer__lr": 0.0,
        "spectral__method": "full",
        "train__global_batch_size": 1,
        "train__micro_batch_size": 1,
        "train__steps": 4,
    }
    same = tiny_config(corpus, tmp_path / "same", **changes)
    assert built(same).loader.num_samples == 1
    assert len(set(train_tiny(same)["losses"].values())) == 1
    masked = tiny_config(corpus, tmp_path / "masked", model__dropout=0.2, **changes)
    assert len(set(train_tiny(masked)["losses"].values())) == 4


LEARNING = {
    "train__steps": 30,
    "optimizer__lr": 5e-3,
    "optimizer__spectral_lr": 5e-3,
    "optimizer__warmup_steps": 2,
    "spectral__steps_per_iteration": 10,
    "train__micro_batch_size": 12,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"spectral__method": "full"},
        {"spectral__method": "sst"},
        {"spectral__method": "sst", "spectral__storage": "factored"},
        {"spectral__method": "sst", "spectral__gradient": "default"},
        {"spectral__method": "sst", "model__name": "llama-60m"},
        {"spectral__method": "lora"},
        {"spectral__method": "relora"},
        {"spectral__method": "galore"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_the_loss_falls(corpus: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    losses = train_tiny(tiny_config(corpus, tmp_path, **LEARNING, **changes))["losses"]
    first = np.mean([losses[step] for step in (1, 2, 3)])
    last = np.mean([losses[step] for step in (28, 29, 30)])
    assert last < first - 0.4, (first, last)


def test_bf16_trains_full_precision_weights(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path, **LEARNING, train__precision="bf16")
    run = built(config)
    for name, parameter in run.model.named_parameters():
        frozen = name.endswith(".residual")
        assert parameter.requires_grad is not frozen
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    for state in run.optimizer.state.values():
        assert {t.dtype for t in state.values()} == {torch.float32}
    losses = train_tiny(config)["losses"]
    assert losses[30] < losses[1] - 0.4
    exact = train_tiny(tiny_config(corpus, tmp_path / "b", **LEARNING))["losses"]
    assert losses != exact
    assert max(abs(losses[s] - exact[s]) for s in losses) < 0.05
