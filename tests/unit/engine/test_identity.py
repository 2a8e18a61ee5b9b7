"""The identity of a run: what checkpoints of earlier versions, which lack a key, stand for."""

from typing import Any, cast

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.engine.identity import SINCE, check_identity, run_identity
from spectral_scale.errors import ResumeMismatchError


class NoData:
    """A loader without data."""

    state_fingerprint: dict[str, Any] = {}


def identity(*words: str) -> dict[str, Any]:
    run = resolve(load_config([], words).config, world_size=1)
    return run_identity(run, cast(Any, NoData()))


def test_checkpoints_from_before_a_key_go_on_at_its_first_value() -> None:
    now = identity("--spectral.steps_per_iteration=7")
    assert now["spectral.steps_per_iteration"] == 7
    assert not SINCE.keys() & now.keys()
    assert check_identity(dict(now), now, allowed=[], run_dir="run") == []


def test_another_form_is_another_run() -> None:
    sst, tangent = identity(), identity("--spectral.form=tangent")
    for saved, current in ((sst, tangent), (tangent, sst)):
        with pytest.raises(ResumeMismatchError, match=r"spectral\.form"):
            check_identity(saved, current, allowed=[], run_dir="run")
    other = identity("--spectral.form=tangent", "--spectral.basis=svd")
    with pytest.raises(ResumeMismatchError, match=r"spectral\.basis"):
        check_identity(tangent, other, allowed=[], run_dir="run")
