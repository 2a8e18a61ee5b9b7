"""Every rule across keys: what was given, what is required, what to do; all of them at once."""

from typing import Any

import pytest

from spectral_scale.config.check import (
    check_config,
    gradient_accumulation_steps,
)
from spectral_scale.config.load import load_config
from spectral_scale.config.methods.sst import iterations_per_round, trains_all_sigma
from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.errors import ConfigError


def config_with(**changes: Any) -> RunConfig:
    """The defaults (opt-tiny) with `section__key=value`."""
    words = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return load_config([], words).config


def problem(world_size: int = 1, **changes: Any) -> str:
    """What check_config says about the defaults with changes."""
    with pytest.raises(ConfigError) as caught:
        check_config(config_with(**changes), world_size=world_size)
    return str(caught.value)


def test_the_defaults_run() -> None:
    architecture = check_config(RunConfig(), world_size=1)
    assert (architecture.hidden_size, architecture.num_layers) == (256, 4)


AT_LEAST_ONE = [
    "model.sequence_length",
    "model.hidden_size",
    "model.num_layers",
    "model.num_heads",
    "model.ffn_size",
    "spectral.spectral_rank",
    "spectral.steps_per_iteration",
    "spectral.iterations_per_round",
    "optimizer.decay_steps",
    "data.validation_sequences",
    "train.steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.eval_interval",
    "checkpoint.interval",
    "checkpoint.keep_last",
    "metrics.log_interval",
]
AT_LEAST_ZERO = [
    "spectral.iteration_warmup_steps",
    "optimizer.lr",
    "optimizer.spectral_lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_grad_norm",
    "optimizer.warmup_steps",
    "data.num_workers",
]


@pytest.mark.parametrize("key", AT_LEAST_ONE)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_at_least_one(key: str, value: int) -> None:
    """Zero is an error too, not another way to say "not given"."""
    assert f"{key}={value} must be at least 1" in problem(**{key.replace(".", "__"): value})


@pytest.mark.parametrize("key", AT_LEAST_ZERO)
def test_amounts_are_not_negative(key: str) -> None:
    name = key.replace(".", "__")
    assert f"{key}=-1" in (text := problem(**{name: -1})) and "at least 0" in text
    check_config(config_with(**{name: 0}), world_size=1)


@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.eps", "optimizer.clip_grad_norm"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_amounts_are_finite(key: str, value: str) -> None:
    text = problem(**{key.replace(".", "__"): value})
    assert f"{key}={value.strip('.')} must be finite" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dropout": 1.0}, "model.dropout=1.0 must lie in [0, 1)"),
        ({"model__dropout": -0.1}, "model.dropout=-0.1 must lie in [0, 1)"),
        ({"optimizer__betas": "[1.0, 0.9]"}, "optimizer.betas[0]=1.0 must lie in [0, 1)"),
        ({"optimizer__betas": "[0.9, -1]"}, "optimizer.betas[1]=-1.0 must lie in [0, 1)"),
        ({"optimizer__min_lr_ratio": 1.1}, "optimizer.min_lr_ratio=1.1 must lie in"),
        ({"optimizer__galore_scale": 0}, "optimizer.galore_scale=0.0 must be finite and above 0"),
        ({"spectral__lora_alpha": 0}, "spectral.lora_alpha=0.0 must be finite and above 0"),
    ],
)
def test_fractions_and_scales(changes: dict[str, Any], message: str) -> None:
    assert message in problem(**changes)


def test_a_learning_rate_may_stay_at_its_peak() -> None:
    check_config(config_with(optimizer__min_lr_ratio=1.0), world_size=1)


def test_rank_above_the_smaller_side() -> None:
    """Every linear of a block is named, with its shape and the largest rank."""
    text = problem(spectral__spectral_rank=300)
    for name, shape in {"q_proj": "256 x 256", "fc1": "1024 x 256", "fc2": "256 x 1024"}.items():
        assert (
            f"spectral.spectral_rank=300 exceeds min(m, n)=256 of {name} ({shape}); "
            "lower it to at most that"
        ) in text
    check_config(config_with(spectral__spectral_rank=256), world_size=1)
    check_config(config_with(spectral__spectral_rank=300, spectral__method="full"), world_size=1)


@pytest.mark.parametrize("method", ["lora", "relora", "galore"])
def test_rank_holds_for_every_low_rank_method(method: str) -> None:
    text = problem(spectral__spectral_rank=257, spectral__method=method)
    assert "spectral_rank=257 exceeds" in text


def test_sequences_longer_than_positions() -> None:
    text = problem(model__sequence_length=1025)
    assert "model.sequence_length=1025 exceeds the model's 1024 positions" in text
    assert "lower it to at most 1024" in text


def test_batches_that_do_not_divide() -> None:
    text = problem(world_size=3, train__global_batch_size=12, train__micro_batch_size=8)
    assert "train.global_batch_size=12 is not divisible by train.micro_batch_size=8 x 3" in text
    assert "must be one of [1, 2, 4]" in text
    text = problem(world_size=5, train__global_batch_size=12, train__micro_batch_size=1)
    assert "5 data-parallel ranks" in text
    assert "set train.global_batch_size to a multiple of 5" in text


def test_accumulation_follows_from_batches_and_ranks() -> None:
    config = config_with(train__global_batch_size=24, train__micro_batch_size=2)
    assert [gradient_accumulation_steps(config, world_size=n) for n in (1, 2, 3)] == [12, 6, 4]


def test_all_sigma_need_factored_storage() -> None:
    text = problem(spectral__trained_sigma="all")
    assert "spectral.trained_sigma=all needs spectral.storage=factored" in text
    check_config(
        config_with(spectral__trained_sigma="all", spectral__storage="factored"), world_size=1
    )


def test_eight_bits_need_a_residual_and_plain_blocks() -> None:
    text = problem(spectral__residual_dtype="int8", spectral__storage="factored")
    assert "spectral.residual_dtype=int8 needs spectral.storage=residual" in text
    text = problem(spectral__residual_dtype="int8", model__compile=True)
    assert "spectral.residual_dtype=int8 was not tried in compiled blocks" in text
    check_config(config_with(spectral__residual_dtype="int8"), world_size=1)


@pytest.mark.parametrize(
    ("storage", "trained", "expected"),
    [
        ("residual", "auto", False),
        ("factored", "auto", True),
        ("factored", "active", False),
        ("residual", "active", False),
        ("factored", "all", True),
    ],
)
def test_which_sigma_train(storage: Any, trained: Any, expected: bool) -> None:
    assert trains_all_sigma(SpectralConfig(storage=storage, trained_sigma=trained)) is expected


def test_iterations_per_round_cover_the_largest_matrix() -> None:
    assert iterations_per_round(SpectralConfig(spectral_rank=16), [64, 100]) == 7
    assert iterations_per_round(SpectralConfig(iterations_per_round=3), [64, 100]) == 3


def test_tf32_is_for_single_precision() -> None:
    assert "train.tf32=true has no effect on train.precision=bf16" in problem(
        train__tf32=True, train__precision="bf16"
    )
    check_config(config_with(train__tf32=True), world_size=1)


def test_several_problems_are_listed_at_once() -> None:
    changes = {"train__steps": 0, "optimizer__lr": -1, "train__micro_batch_size": 5}
    for more, part in (
        ({"spectral__spectral_rank": 300}, "spectral_rank=300"),
        ({"model__sequence_length": 2000}, "sequence_length=2000"),
        ({"model__name": "opt-125"}, "model.name=opt-125 is no preset; did you mean opt-125m?"),
    ):
        lines = problem(**changes, **more).splitlines()
        assert lines[0] == "the configuration cannot run:"
        for expected in ("train.steps=0", "optimizer.lr=-1.0", "not divisible", part):
            assert any(line.startswith("  - ") and expected in line for line in lines)
