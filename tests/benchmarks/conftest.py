"""The study lies beside the tests, not in the package: make it importable."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from study import settings as declared


@pytest.fixture
def tiny_study(monkeypatch):
    """A study of two variants, two learning rates more than the first, one seed and no ablation."""
    monkeypatch.setattr(declared, "VARIANTS", (declared.FULL, declared.SST))
    monkeypatch.setattr(declared, "ABLATIONS", (declared.BASE,))
    monkeypatch.setattr(declared, "DIP_VARIANTS", ())
    monkeypatch.setattr(declared, "SEEDS", (0,))
