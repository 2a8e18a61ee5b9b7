"""The list of checks: complete, documented, and the same for the command and for pytest."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from spectral_scale.errors import ConfigError
from spectral_scale.gpu_checks.catalogue import CHECKS, named
from spectral_scale.gpu_checks.runner import CHECK_SECONDS, TOTAL_SECONDS

ROOT = Path(__file__).parents[3]


def test_every_check_is_a_function_of_a_place() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        function = getattr(
            import_module(f"spectral_scale.gpu_checks.{check.module}"), check.function
        )
        assert list(inspect.signature(function).parameters) == ["place"]


def test_every_check_has_a_row_on_the_page() -> None:
    page = (ROOT / "docs" / "gpu_checks.md").read_text(encoding="utf-8")
    assert [check.name for check in CHECKS if f"| `{check.name}` |" not in page] == []


def test_checks_are_named_in_the_order_of_the_list() -> None:
    assert named([]) == list(CHECKS)
    assert [check.name for check in named(["svd", "layers"])] == ["layers", "svd"]
    with pytest.raises(ConfigError, match="no such check; give one of layers, tf32"):
        named(["layers", "nonsense"])


def test_the_time_limits_are_those_promised() -> None:
    assert (CHECK_SECONDS, TOTAL_SECONDS) == (480.0, 1200.0)
