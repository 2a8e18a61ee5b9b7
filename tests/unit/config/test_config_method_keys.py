"""Settings of the methods: checked where they are used, named where they are not."""

from dataclasses import replace

import pytest

from spectral_scale.config.check import check_config, keys_without_effect
from spectral_scale.config.load import known_keys, load_config
from spectral_scale.config.methods import METHOD_SPECS, method_name
from spectral_scale.config.schema import RunConfig
from spectral_scale.engine.methods import METHODS
from spectral_scale.errors import ConfigError


def config(**changes: object) -> RunConfig:
    return load_config([], [f"--{k.replace('__', '.')}={v}" for k, v in changes.items()]).config


def choosing(method: str) -> dict[str, str]:
    """Settings that choose a method, or the form of one that has a name of its own."""
    if method == "tangent":
        return {"spectral__form": "tangent"}
    return {"spectral__method": method}


def test_every_method_is_known_everywhere() -> None:
    assert METHODS.keys() == METHOD_SPECS.keys()
    for method in METHODS:
        chosen = config(**choosing(method))
        assert method_name(chosen.spectral) == method
        assert check_config(chosen, world_size=1)
    assert set().union(*(spec.keys for spec in METHOD_SPECS.values())) <= set(known_keys())


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_never_named(method: str) -> None:
    assert keys_without_effect(config(**choosing(method))) == []


def test_keys_given_in_vain_are_named() -> None:
    given = {
        "spectral__storage": "factored",
        "spectral__lora_alpha": 32,
        "optimizer__galore_scale": 1.0,
    }
    named = {method: keys_without_effect(config(**choosing(method), **given)) for method in METHODS}
    storage, alpha, scale = "spectral.storage", "spectral.lora_alpha", "optimizer.galore_scale"
    assert named == {
        "full": [scale, alpha, storage],
        "sst": [scale, alpha],
        "tangent": [scale, alpha, storage],
        "lora": [scale, storage],
        "relora": [scale, storage],
        "galore": [alpha, storage],
        "frod": [scale, alpha, storage],
    }


@pytest.mark.parametrize("method", ["sst", "lora", "relora", "galore"])
def test_a_rank_that_does_not_fit_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="spectral_rank=300 exceeds"):
        check_config(config(spectral__method=method, spectral__spectral_rank=300), world_size=1)


def test_a_form_belongs_to_its_method() -> None:
    """Other methods say that it has no effect on them."""
    chosen = config(spectral__method="lora", spectral__form="tangent")
    assert method_name(chosen.spectral) == "lora"
    assert keys_without_effect(chosen) == ["spectral.form"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"settings": "paper", "form": "tangent"}, "has no spectral.form=tangent; leave one"),
        ({"basis": "random"}, "spectral.basis=random needs spectral.form=tangent"),
        (
            {"form": "tangent", "sampling": "uniform"},
            "spectral.sampling=uniform needs spectral.basis=svd",
        ),
        ({"form": "tangent", "spectral_rank": 300}, "spectral_rank=300 exceeds"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_form_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_config(config(**{f"spectral__{k}": v for k, v in changes.items()}), world_size=1)


def test_tensor_parallelism_takes_the_tangent_form_on_fsdp2_alone() -> None:
    chosen = {"spectral__form": "tangent", "parallel__tensor_parallel": 2}
    fsdp2 = chosen | {"parallel__backend": "fsdp2"}
    for basis in ("random", "svd"):
        check_config(config(**fsdp2, spectral__basis=basis), world_size=2)
    refused = [
        (chosen | {"parallel__backend": "megatron"}, r"SST, tangent form \(form=tangent\)"),
        (fsdp2 | {"optimizer__name": "muon"}, r"Muon for trained factors \(muon=factors\)"),
    ]
    for changes, what in refused:
        with pytest.raises(ConfigError, match=f"{what} does not run on"):
            check_config(config(**changes), world_size=2)


def test_muon_is_refused_by_name_where_it_cannot_train() -> None:
    for method in ("sst", "lora", "relora", "galore", "frod"):
        with pytest.raises(ConfigError, match=r"not what .* trains; set optimizer.name=adamw"):
            check_config(config(spectral__method=method, optimizer__name="muon"), world_size=1)
    tangent = {"spectral__form": "tangent", "optimizer__name": "muon"}
    dense = {"spectral__method": "full", "optimizer__name": "muon"}
    zero = {"parallel__backend": "deepspeed"}
    fsdp2 = {"parallel__backend": "fsdp2"}
    for chosen, feature in (
        (tangent | zero, r"Muon for trained factors \(muon=factors\) does not run on zero2"),
        (dense | zero, r"Muon for dense matrices \(muon=matrices\) does not run on zero2"),
        (dense | fsdp2, r"\(muon=matrices\) does not run on fsdp2: torch.optim.Muon would gather"),
    ):
        with pytest.raises(ConfigError, match=feature):
            check_config(config(**chosen), world_size=2)
    for chosen in (tangent, tangent | fsdp2, dense):
        check_config(config(**chosen), world_size=2)


def test_scale_is_refused_by_name_where_it_cannot_train() -> None:
    for chosen in ({"spectral__form": "tangent"}, {"spectral__method": "galore"}):
        with pytest.raises(ConfigError, match="optimizer.name=scale trains the matrices of"):
            check_config(config(**chosen, optimizer__name="scale"), world_size=1)
    dense = {"spectral__method": "full", "optimizer__name": "scale"}
    check_config(config(**dense), world_size=2)
    assert keys_without_effect(config(**dense, optimizer__spectral_lr=0.1)) == []
    with pytest.raises(ConfigError, match=r"\(scale=matrices\) does not run on fsdp2"):
        check_config(config(**dense, parallel__backend="fsdp2"), world_size=2)


def test_muon_s_keys_have_effect_with_muon_alone() -> None:
    given = {"optimizer__muon_momentum": 0.9, "optimizer__spectral_lr": 0.1}
    dense = {"spectral__method": "full"}
    named = ["optimizer.muon_momentum", "optimizer.spectral_lr"]
    assert keys_without_effect(config(**given, **dense)) == named
    assert keys_without_effect(config(**given, **dense, optimizer__name="muon")) == []
    with pytest.raises(ConfigError, match="optimizer.muon_momentum=1.0 must lie in"):
        check_config(config(optimizer__muon_momentum=1.0), world_size=1)


def test_full_training_has_no_rank_to_check() -> None:
    check_config(config(spectral__method="full", spectral__spectral_rank=300), world_size=1)


@pytest.mark.parametrize("key", ["spectral__lora_alpha", "optimizer__galore_scale"])
@pytest.mark.parametrize("value", [0, -1, "inf", "nan"])
def test_scales_must_be_positive(key: str, value: object) -> None:
    section, name = key.split("__")
    run = RunConfig()
    changed = replace(getattr(run, section), **{name: float(value)})
    with pytest.raises(ConfigError, match=f"{section}.{name}=.* must be finite and above 0"):
        check_config(replace(run, **{section: changed}), world_size=1)


def test_what_trains_also_needs_a_frozen_rest() -> None:
    with pytest.raises(ConfigError, match=r"train_also=\['lm_head'\] needs spectral.train_dense"):
        check_config(config(spectral__train_also=["lm_head"]), world_size=1)
    frozen = config(spectral__train_also=["lm_head"], spectral__train_dense=False)
    check_config(frozen, world_size=1)
