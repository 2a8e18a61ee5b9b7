"""Settings of FRoD and of what stays frozen: refused by name where they cannot work; counted."""

import json
from pathlib import Path

import pytest

from spectral_scale.cli.main import main
from spectral_scale.config.check import check_config
from spectral_scale.config.load import load_config
from spectral_scale.config.presets import resolve_architecture
from spectral_scale.config.schema import ModelConfig, RunConfig, SpectralConfig
from spectral_scale.engine.counts import counts_of
from spectral_scale.errors import ConfigError

LLAMA_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
"""The shapes of Llama-3.2-3B."""


def config(**changes: object) -> RunConfig:
    words = {"spectral.method": "frod"} | {k.replace("__", "."): v for k, v in changes.items()}
    return load_config([], [f"--{k}={v}" for k, v in words.items()]).config


@pytest.fixture
def llama_3b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3B))
    return tmp_path


@pytest.mark.parametrize(("sparsity", "published"), [(0.01, 5_456_808), (0.02, 10_741_640)])
def test_published_counts(
    sparsity: float, published: int, llama_3b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of q_proj and v_proj alone: n + floor(s n^2) a matrix."""
    words = ["--sparsity", str(sparsity), "--targets", "q_proj,v_proj", "--freeze-dense"]
    assert main(["count", str(llama_3b), *words, "--format", "json"]) == 0
    full, frod = json.loads(capsys.readouterr().out)
    assert (full["method"], frod["method"]) == ("full", "frod")
    assert frod["trained"] == published
    assert full["trained"] == full["dense"] == frod["dense"] == 3_212_749_824


def test_what_else_trains_is_counted() -> None:
    """With embeddings, norms and biases, as in the other methods."""
    model = ModelConfig(name="opt-125m")
    shapes = resolve_architecture(model)
    alone = counts_of(shapes, model, SpectralConfig(method="frod", train_dense=False))
    together = counts_of(shapes, model, SpectralConfig(method="frod"))
    dense = counts_of(shapes, model, SpectralConfig(method="lora", spectral_rank=1))
    factors = counts_of(
        shapes, model, SpectralConfig(method="lora", spectral_rank=1, train_dense=False)
    )
    assert together.trained - alone.trained == dense.trained - factors.trained
    assert alone.trained == 12 * (5 * (768 + 5898) + 3072 + 94371)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spectral__sparsity": 1e-6}, r"selects none of the 256 x 256 entries of S of q_proj"),
        ({"spectral__sparsity": 1e-6}, r"set it to at least 1.53e-05"),
        ({"spectral__sparsity": 0}, r"spectral.sparsity=0.0 must lie in \(0, 1\]"),
        ({"spectral__ridge": 0}, "spectral.ridge=0.0 must be finite and above 0"),
        ({"model__num_layers": 1}, "the model has one block"),
        ({"spectral__targets": "[query]"}, r"targets holds query, .* are \['q_proj'"),
        (
            {"spectral__method": "full", "spectral__targets": "[fc1]"},
            r"targets needs a method that converts linears \(sst, lora, relora, frod\)",
        ),
        (
            {"spectral__method": "galore", "spectral__train_dense": False},
            "train_dense=false needs a method that converts linears",
        ),
        ({"optimizer__value_lr": -1}, "optimizer.value_lr=-1.0 must be finite and at least 0"),
        ({"data__examples": 0}, "data.examples=0 must be at least 1"),
        ({"model__compile": True}, "model.compile=true was not tried with spectral.method=frod"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config(**changes), world_size=1)


def test_a_rank_is_held_against_the_targets_alone() -> None:
    """Three matrices of fc1's shape would allow it; q_proj is 256 x 256."""
    sst = {"spectral__method": "sst", "spectral__spectral_rank": 256}
    assert check_config(config(**sst, spectral__targets="[q_proj]"), world_size=1)
    assert check_config(config(spectral__spectral_rank=9999), world_size=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --spectral-rank R (for LoRA and SST), --sparsity S (FRoD) or both"),
        (["--sparsity", "2"], "--sparsity 2.0 must lie in (0, 1]"),
        (["--sparsity", "0.01", "--targets", "qproj"], "spectral.targets holds qproj"),
    ],
)
def test_bad_arguments_of_count(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["count", "opt-125m", *words]) == 78
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parallel", "row"),
    [
        ({"backend": "megatron", "tensor_parallel": 2}, "megatron"),
    ],
    ids=str,
)
def test_backends_that_no_test_has_shown(parallel: dict[str, object], row: str) -> None:
    changes = {f"parallel__{key}": value for key, value in parallel.items()}
    with pytest.raises(ConfigError) as caught:
        check_config(config(**changes), world_size=2)
    assert f"FRoD (method=frod) does not run on {row}" in str(caught.value)
