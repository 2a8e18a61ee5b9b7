"""A rehearsal's place, and one that claims to have GPUs."""

from dataclasses import replace
from pathlib import Path

import pytest

from spectral_scale.gpu_checks.place import Place, find_place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return find_place(tmp_path, rehearsal=True)


@pytest.fixture
def judging(place: Place) -> Place:
    """A place on the CPU whose figures are judged as those of a GPU are."""
    return replace(place, rehearsal=False)
