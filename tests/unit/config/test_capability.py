"""The capability table: every yes is proved by a test that exists, every no says what to do."""

import re
from importlib.metadata import PackageNotFoundError
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.config import packages
from spectral_scale.config.capability import (
    CAPABILITIES,
    markdown_table,
    requested,
    shards_residual,
    variant,
)
from spectral_scale.config.check import check_config
from spectral_scale.config.load import load_config
from spectral_scale.config.schema import RunConfig
from spectral_scale.config.support import FEATURES, No, Yes
from spectral_scale.engine import backends
from spectral_scale.errors import ConfigError

ROOT = Path(__file__).parents[3]


def config_with(**changes: Any) -> RunConfig:
    words = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return load_config([], words).config


def problem(world_size: int = 4, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(config_with(**changes), world_size=world_size)
    return str(caught.value)


def missing_test(node: str) -> str | None:
    """Why the test that a yes names does not exist, if so."""
    file, _, name = node.partition("::")
    path = ROOT / file
    if not path.is_file():
        return f"no file {file}"
    function = name.partition("[")[0]
    if function and not re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE):
        return f"no test {function} in {file}"
    return None


ENTRIES = [(row, f, s) for row, cells in CAPABILITIES.items() for f, s in cells.items()]


def test_every_yes_names_a_test_that_exists() -> None:
    faults = {
        (row, feature): fault
        for row, feature, support in ENTRIES
        if isinstance(support, Yes) and (fault := missing_test(support.test))
    }
    assert faults == {}


def test_a_test_that_does_not_exist_is_found() -> None:
    assert missing_test("tests/unit/config/test_capability.py::test_nothing")
    assert missing_test("tests/unit/config/test_none.py")


def test_every_no_has_a_reason_and_every_feature_a_name() -> None:
    assert all(s.reason for _, _, s in ENTRIES if isinstance(s, No))
    assert {feature for _, feature, _ in ENTRIES} <= set(FEATURES)


@pytest.mark.slow
def test_whatever_can_be_requested_has_a_name() -> None:
    methods = ("full", "sst", "lora", "relora", "galore", "frod")
    backends = ("torch", "deepspeed", "fsdp2")
    for method, backend in product(methods, backends):
        config = config_with(
            spectral__method=method,
            parallel__backend=backend,
            model__activation_checkpointing=True,
            model__compile=True,
            model__dropout=0.1,
        )
        assert set(requested(config)) <= set(FEATURES)


@pytest.mark.parametrize(
    ("changes", "world", "row"),
    [
        ({}, 4, "torch"),
        ({"backend": "fsdp2"}, 4, "fsdp2"),
        ({"backend": "fsdp2", "shard_group": 4}, 4, "fsdp2"),
        ({"backend": "fsdp2", "shard_group": 2}, 4, "hsdp"),
        ({"backend": "deepspeed"}, 4, "zero2"),
        ({"backend": "deepspeed", "zero_stage": 3, "offload": "cpu"}, 4, "zero3+offload"),
    ],
    ids=str,
)
def test_rows(changes: dict[str, Any], world: int, row: str) -> None:
    config = config_with(**{f"parallel__{k}": v for k, v in changes.items()})
    assert variant(config.parallel, world_size=world) == row
    assert row in CAPABILITIES


@pytest.mark.parametrize(
    ("changes", "sharded"),
    [
        ({}, False),
        ({"backend": "fsdp2"}, True),
        ({"backend": "fsdp2", "residual": "replicated"}, False),
        ({"backend": "deepspeed", "zero_stage": 2}, False),
        ({"backend": "deepspeed", "zero_stage": 3}, True),
    ],
    ids=str,
)
def test_frozen_weights_follow_the_trained_ones(changes: dict[str, Any], sharded: bool) -> None:
    config = config_with(**{f"parallel__{k}": v for k, v in changes.items()})
    assert shards_residual(config.parallel) is sharded


def test_what_a_backend_cannot_do_is_refused_by_name() -> None:
    text = problem(parallel__backend="megatron", spectral__method="galore")
    assert "GaLore (method=galore) does not run on megatron" in text
    assert "set parallel.backend=fsdp2" in text
    assert "residual=sharded) does not run on torch" in problem(parallel__residual="sharded")
    eight = problem(parallel__backend="megatron", spectral__residual_dtype="int8")
    assert "SST, residual of eight bits (residual_dtype=int8) does not run on megatron" in eight


@pytest.mark.parametrize(
    ("changes", "owner"),
    [
        ({"zero_stage": 1}, "deepspeed"),
        ({"offload": "cpu"}, "deepspeed"),
        ({"deepspeed_config": "a.json"}, "deepspeed"),
        ({"shard_group": 2}, "fsdp2"),
    ],
    ids=str,
)
def test_keys_of_another_backend_are_refused(changes: dict[str, Any], owner: str) -> None:
    text = problem(**{f"parallel__{k}": v for k, v in changes.items()})
    assert "has no effect on parallel.backend=torch" in text
    assert f"set parallel.backend={owner}" in text


@pytest.mark.parametrize("group", [0, 3, 8])
def test_shard_groups_must_divide_the_ranks(group: int) -> None:
    text = problem(parallel__backend="fsdp2", parallel__shard_group=group)
    assert f"parallel.shard_group={group} must divide the 4 ranks; one of [1, 2, 4]" in text


def test_a_missing_backend_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(parallel__backend="deepspeed")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packages, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'spectral-scale\[deepspeed\]'"):
        backends.require_backend(config)


def test_the_backends_page_holds_the_table() -> None:
    """After changing a row, paste the output of `markdown_table()` into docs/backends.md."""
    assert markdown_table() in (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")


def test_table_shows_every_row_and_feature() -> None:
    table = markdown_table()
    lines = table.splitlines()
    assert len(lines) == len(FEATURES) + 2
    assert all(row in lines[0] for row in ("torch", "fsdp2", "hsdp", "zero3+offload"))
    assert len({line.count("|") for line in lines}) == 1
