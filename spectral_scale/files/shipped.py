"""Files that are shipped beside the package: job scripts, DeepSpeed files, the quickstart."""

import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "spectral_scale"
"""Where a wheel puts them; see `[tool.setuptools.data-files]` in pyproject.toml."""


def shipped_folder(name: str) -> Path:
    """`slurm`, `ds_configs` or `launch`: the checkout's, or that of an installed wheel.

    The folder need not exist: whoever reads a file in it says what is missing.
    """
    checkout = CHECKOUT / name
    return checkout if (CHECKOUT / "pyproject.toml").is_file() else INSTALLED / name
