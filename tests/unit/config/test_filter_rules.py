"""Filters that cannot work are refused before a run starts, with what to do instead."""

from typing import Any

import pytest

from spectral_scale.config.check import check_config, keys_without_effect
from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.config.schema import FilterConfig, RunConfig
from spectral_scale.engine.identity import run_identity
from spectral_scale.errors import ConfigError

FULL = {"spectral__method": "full"}


def config(**changes: Any) -> RunConfig:
    settings = {"filter__kind": "rational"} | changes
    return load_config([], [f"--{k.replace('__', '.')}={v}" for k, v in settings.items()]).config


@pytest.mark.parametrize(
    "changes",
    [
        FULL,
        {"spectral__method": "sst"},
        {"spectral__method": "frod"},
        {"spectral__method": "lora", "filter__nodes": "block_gains"},
        {"spectral__method": "sst", "filter__nodes": "rows", "spectral__targets": "[fc1]"},
        FULL | {"filter__nodes": "heads", "filter__graph": "complete"},
        FULL | {"filter__kind": "none", "filter__joint_loss_mu": 0.1, "filter__anchor_steps": 5},
    ],
    ids=str,
)
def test_what_runs(changes: dict[str, Any]) -> None:
    check_config(config(**changes), world_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spectral__method": "sst", "filter__nodes": "rows"}, "no dense matrix in the blocks"),
        ({"spectral__method": "lora"}, "bases of their own; use block_gains"),
        ({"spectral__method": "relora", "filter__nodes": "rows"}, "use block_gains"),
        ({"spectral__method": "frod", "filter__nodes": "heads"}, "use layers or block_gains"),
        ({"spectral__method": "galore"}, "use spectral.method=full"),
        (FULL | {"model__num_layers": 1}, "needs two layers or more"),
        (FULL | {"filter__strength": -1}, "filter.strength=-1.0 must be finite and at least 0"),
        (FULL | {"filter__strength": ".inf"}, "filter.strength=inf must be finite"),
        (FULL | {"filter__neighbors": 0}, "filter.neighbors=0 must be at least 1"),
        (FULL | {"filter__refresh_steps": 0}, "filter.refresh_steps=0 must be at least 1"),
        (FULL | {"filter__gradient_decay": 1}, "filter.gradient_decay=1.0 must lie in"),
        (FULL | {"filter__joint_loss_mu": -0.1}, "filter.joint_loss_mu=-0.1 must be finite"),
        (FULL | {"filter__anchor_steps": 5}, "no effect without joint_loss_mu"),
        (
            FULL | {"filter__norm_matched": True, "filter__joint_loss_mu": 0.1},
            "set filter.joint_loss_mu=0",
        ),
        (
            FULL | {"filter__nodes": "block_gains", "filter__graph": "knn"},
            "block_gains knows only sizes",
        ),
        (
            FULL | {"filter__nodes": "block_gains", "filter__joint_loss_mu": 1},
            "block_gains knows only sizes",
        ),
        (
            FULL | {"parallel__backend": "deepspeed", "train__precision": "fp16"},
            "fp16's loss scale would enter the mean gradients",
        ),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config(**changes), world_size=1)


def test_an_unknown_node_is_named() -> None:
    with pytest.raises(ConfigError, match="filter.nodes"):
        config(filter__nodes="columns")


class Loader:
    state_fingerprint: dict[str, str] = {}


def test_a_filter_is_part_of_what_a_resumed_run_must_have_in_common() -> None:
    """And a run without one can be resumed from checkpoints older than the filter."""
    without, other = config(filter__kind="none"), config(**FULL, filter__strength=2.0)
    loader: Any = Loader()
    bare = run_identity(resolve(without, world_size=1), loader)
    assert not [k for k in bare if k.startswith("filter.")]
    facts = run_identity(resolve(other, world_size=1), loader)
    assert facts["filter.strength"] == 2.0
    assert {k for k in facts if k.startswith("filter.")} == {
        f"filter.{name}" for name in FilterConfig.__dataclass_fields__
    }


def test_keys_of_a_filter_that_is_off_are_named() -> None:
    assert keys_without_effect(config(**FULL, filter__kind="none", filter__strength=2.0)) == [
        "filter.strength"
    ]
    assert keys_without_effect(config(**FULL, filter__strength=2.0)) == []
