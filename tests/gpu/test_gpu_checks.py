"""The GPU checks of `spectral-scale doctor --gpu`, one test each: `pytest -m gpu`."""

from pathlib import Path

import pytest

from spectral_scale.gpu_checks.catalogue import CHECKS, Check
from spectral_scale.gpu_checks.place import find_place, no_gpu
from spectral_scale.gpu_checks.runner import CHECK_SECONDS, Session, run_check


@pytest.mark.gpu
@pytest.mark.timeout(CHECK_SECONDS + 60)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check(check: Check, tmp_path: Path) -> None:
    if reason := no_gpu():
        pytest.skip(reason)
    session = Session(place=find_place(tmp_path, rehearsal=False))
    result = run_check(session, check, seconds=CHECK_SECONDS)
    if result.verdict == "skip":
        pytest.skip(result.reason)
    assert result.verdict == "pass", f"{result.reason}\n{result.text}"
