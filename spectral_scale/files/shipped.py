"""Files that are shipped beside the package: job scripts, DeepSpeed files, the quickstart."""

import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "spectral_scale"
"""Folder into which a wheel puts these files (`[tool.setuptools.data-files]`, pyproject.toml)."""


def shipped_folder(name: str) -> Path:
    """`slurm`, `ds_configs` or `launch`: the checkout's, or that of an installed wheel.

    The folder need not exist: whoever reads a file in it says what is missing.
    """
    checkout = CHECKOUT / name
    return checkout if (CHECKOUT / "pyproject.toml").is_file() else INSTALLED / name
