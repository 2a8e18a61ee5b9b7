"""Runs and models that megatron-core cannot hold are refused before any process group is made."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spectral_scale.backends.megatron
from spectral_scale.config import packages
from spectral_scale.config.check import check_config
from spectral_scale.config.load import load_config
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.engine import backends as hosts
from spectral_scale.errors import ConfigError

ROOT = Path(__file__).parents[3]
CASES: list[tuple[dict[str, Any], str]] = [
    ({"parallel__tensor_parallel": 3}, "does not divide the 12 attention heads|must divide the 4"),
    (
        {"model__hidden_size": 192, "model__num_heads": 6, "parallel__tensor_parallel": 4},
        "4 does not divide the 6 attention heads",
    ),
    ({"model__ffn_size": 1026, "parallel__tensor_parallel": 4}, "divide the 1026 feed-forward"),
    ({"model__vocab_size": 514, "parallel__tensor_parallel": 4}, "514 rows of the vocabulary"),
    (
        {
            "parallel__tensor_parallel": 4,
            "parallel__sequence_parallel": True,
            "model__sequence_length": 102,
        },
        "sequence_length=102 cannot be split",
    ),
    ({"parallel__sequence_parallel": True}, "raise parallel.tensor_parallel"),
    ({"model__name": "opt-350m"}, "no such projection"),
    ({"spectral__method": "lora"}, "LoRA .* does not run on megatron"),
    ({"spectral__method": "full"}, "set parallel.backend=fsdp2"),
    ({"spectral__direction_lr_scaling": "width"}, "direction_lr_scaling=width"),
    ({"spectral__targets": "[q_proj]"}, "converts all linears"),
    ({"train__precision": "fp64"}, "fp64"),
    ({"model__dropout": 0.1}, "draws masks .* set model.dropout=0"),
    ({"parallel__zero_stage": 2}, "no effect on parallel.backend=megatron"),
]


def problem(**changes: Any) -> str:
    settings = {"parallel__backend": "megatron", "train__micro_batch_size": 1} | changes
    words = [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]
    with pytest.raises(ConfigError) as caught:
        check_config(load_config([], words).config, world_size=4)
    return str(caught.value)


@pytest.mark.parametrize(("changes", "expected"), CASES, ids=str)
def test_what_does_not_fit_is_named(changes: dict[str, Any], expected: str) -> None:
    message = problem(**changes)
    assert re.search(expected, message), message


def test_what_fits_is_accepted() -> None:
    words = ["--parallel.backend=megatron", "--parallel.tensor_parallel=2", "--model.num_heads=4"]
    words += ["--parallel.sequence_parallel=true", "--model.vocab_size=512"]
    check_config(load_config([], words).config, world_size=4)


@pytest.mark.parametrize("key", ["sequence_parallel", "distributed_optimizer", "factor_gradients"])
def test_keys_of_megatron_are_refused_elsewhere(key: str) -> None:
    value = {"distributed_optimizer": "false", "factor_gradients": "per_step"}.get(key, "true")
    message = problem(parallel__backend="torch", **{f"parallel__{key}": value})
    assert f"parallel.{key}=" in message
    assert "set parallel.backend=megatron" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
            "pipeline_model_parallel_size=2",
        ),
        ({"context_parallel_size": 2}, "context_parallel_size=2"),
        ({"num_moe_experts": 2, "expert_model_parallel_size": 2}, "num_moe_experts=2"),
        ({"params_dtype": torch.bfloat16, "bf16": True}, "triplets train in float32"),
    ],
    ids=str,
)
def test_unsupported_options_of_a_model_are_named(options: dict[str, Any], named: str) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from spectral_scale.megatron import spectral_gpt_layer_spec

    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, add_bias_linear=False, **options
    )
    with pytest.raises(ConfigError, match=named):
        spectral_gpt_layer_spec(config, SpectralConfig())


def test_every_unsupported_option_is_named_at_once() -> None:
    """By the spec and by conversion, before a layer is made: no process group is needed."""
    from spectral_scale.backends.megatron.spec import _NOT_ONE, _NOT_SET
    from spectral_scale.megatron import convert_gpt, spectral_gpt_layer_spec

    options = dict.fromkeys(_NOT_ONE, 2) | dict.fromkeys(_NOT_SET, True)
    bad: Any = SimpleNamespace(**options, params_dtype=torch.float16)
    model: Any = SimpleNamespace(config=bad)
    for refuse in (
        lambda: spectral_gpt_layer_spec(bad, SpectralConfig()),
        lambda: convert_gpt(model, SpectralConfig()),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        for option, value in options.items():
            assert re.search(rf"{option}={value}(:| is) .*; (use|leave)", str(caught.value))
        assert "params_dtype=torch.float16: triplets train in float32; set" in str(caught.value)


def test_a_missing_package_and_an_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused for a run, and for a Megatron user's own script."""
    config = load_config([], ["--parallel.backend=megatron"]).config
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    hosts.require_backend(config)
    assert callable(spectral_scale.megatron.convert_gpt)

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for installed, words in (
        (missing, r"pip install 'spectral-scale\[megatron\]'"),
        (lambda _: "0.17.0", r"tested with megatron-core 0.16, and 0.17.0"),
    ):
        monkeypatch.setattr(packages, "version", installed)
        with pytest.raises(ConfigError, match=f"parallel.backend=megatron .*{words}"):
            hosts.require_backend(config)
        with pytest.raises(ConfigError, match=f"spectral_scale.megatron.convert_gpt .*{words}"):
            _ = spectral_scale.megatron.convert_gpt


def test_what_is_installed_is_what_is_accepted() -> None:
    """The range of the package's extras is the one that runs and the document name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _, accepted = packages.PACKAGES["megatron"]
    major, minor = map(int, str(accepted).split("."))
    (wanted,) = project["optional-dependencies"]["megatron"]
    assert wanted == f"megatron-core>={accepted}.0,<{major}.{minor + 1}"
    assert wanted in project["optional-dependencies"]["test"]
    page = (ROOT / "docs" / "megatron.md").read_text(encoding="utf-8")
    assert f"megatron-core {accepted}.0" in page
    assert version("megatron-core") in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused() -> None:
    config = load_config([], ["--parallel.backend=megatron"]).config
    with pytest.raises(ConfigError, match=r"needs a GPU.*parallel\.backend=fsdp2"):
        hosts.require_backend(config)
