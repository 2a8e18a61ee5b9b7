"""Trained parameters of the published models, the command that prints them, and FLOPs."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from spectral_scale.cli.main import main
from spectral_scale.config.presets import PRESETS, Architecture
from spectral_scale.config.schema import ModelConfig, RunConfig, SpectralConfig
from spectral_scale.engine.counts import count_parameters, counts_of
from spectral_scale.engine.measure import flops_per_token
from spectral_scale.methods.lora.layer import convert_lora
from spectral_scale.methods.sst.layer import convert
from spectral_scale.metrics.flops import attention_flops_per_token, sst_linear_flops
from spectral_scale.parallel.table import parameter_table


def counted(name: str, spectral_rank: int, method: str, storage: str = "residual"):
    config = SpectralConfig(method=method, spectral_rank=spectral_rank, storage=storage)
    return counts_of(PRESETS[name], ModelConfig(name=name), config)


def linears(a: Architecture) -> list[tuple[int, int]]:
    """(m, n) of every linear in the blocks of an OPT, from the shapes alone."""
    d, f = a.hidden_size, a.ffn_size
    return ([(d, d)] * 4 + [(f, d), (d, f)]) * a.num_layers


@pytest.mark.parametrize(
    ("name", "full", "lora", "sst"),
    [
        ("opt-125m", 125.2, 50.9, 51.0),
        ("opt-350m", 331.2, 57.5, 57.7),
        ("opt-1.3b", 1315.8, 164.4, 164.7),
    ],
)
def test_published_models_at_rank_64(name: str, full: float, lora: float, sst: float) -> None:
    low_rank, spectral = counted(name, 64, "lora"), counted(name, 64, "sst", "factored")
    assert round(low_rank.dense / 1e6, 1) == round(spectral.dense / 1e6, 1) == full
    assert round(low_rank.trained / 1e6, 1) == lora
    assert round(spectral.trained / 1e6, 1) == sst
    # Exactly: r (m + n) for the factors, and every singular value.
    shapes = linears(PRESETS[name])
    rest = low_rank.dense - sum(m * n for m, n in shapes)
    assert low_rank.trained == rest + sum(64 * (m + n) for m, n in shapes)
    assert spectral.trained == low_rank.trained + sum(min(m, n) for m, n in shapes)


def test_llama_1b_at_rank_128_trains_18_75_percent() -> None:
    assert round(100 * counted("llama-1b", 128, "sst", "factored").trained_fraction, 2) == 18.75


def test_full_and_galore_train_everything() -> None:
    for method in ("full", "galore"):
        counts = counted("opt-125m", 64, method)
        assert counts.trained == counts.dense == 125_239_296


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "opt-125m", "--spectral-rank", "64", "--format", "json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["full", "lora", "sst residual", "sst factored"]
    assert rows["full"]["share"] == 1.0 and rows["full"]["spectral_rank"] is None
    assert rows["lora"]["trained"] == 50_921_472
    assert rows["sst factored"]["trained"] == 50_976_768
    assert main(["count", "opt-125m", "llama-60m", "--spectral-rank", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[2].split() == ["opt-125m", "lora", "64", "50,921,472", "40.66%"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["opt-125", "--spectral-rank", "8"], "did you mean opt-125m?"),
        (["opt-125m", "--spectral-rank", "1000"], "opt-125m: spectral.spectral_rank=1000 exceeds"),
        (["opt-125m", "--spectral-rank", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments_of_the_command(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["count", *words]) == 78
    assert message in capsys.readouterr().err


def small_model() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 12, bias=False)])
    return model


def flops(model: nn.Module) -> float:
    architecture = SimpleNamespace(vocab_size=10, embedding_size=3, num_layers=2, hidden_size=12)
    run = SimpleNamespace(
        architecture=architecture, table=parameter_table(model), model=model, config=RunConfig()
    )
    fixed = 6 * 10 * 3 + attention_flops_per_token(
        num_layers=2, hidden_size=12, sequence_length=RunConfig().model.sequence_length
    )
    return flops_per_token(run) - fixed


def test_flops_of_every_method() -> None:
    assert flops(small_model()) == 2 * 6 * 12 * 20
    for storage in ("residual", "factored"):
        model = small_model()
        convert(model, SpectralConfig(spectral_rank=3, storage=storage))
        assert flops(model) == 2 * sst_linear_flops(20, 12, 3, 1, storage)
    model = small_model()
    convert_lora(model, SpectralConfig(method="lora", spectral_rank=3))
    assert flops(model) == 2 * (4 * 12 * 20 + 6 * 3 * (12 + 20))


def test_counts_of_a_converted_model() -> None:
    model = small_model()
    convert_lora(model, SpectralConfig(method="lora", spectral_rank=3))
    counts = count_parameters(model, parameter_table(model))
    assert (counts.trained, counts.dense) == (2 * 3 * 32 + 20, 2 * 12 * 20 + 20)
