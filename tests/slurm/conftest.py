"""The cluster that all tests here share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import CannotStartError, Cluster, running_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A SLURM of two nodes; skips with the reason where there can be none."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name:
        try:
            with running_cluster(Path(name).resolve()) as cluster:
                yield cluster
        except CannotStartError as error:
            pytest.skip(f"no SLURM here: {error}")
