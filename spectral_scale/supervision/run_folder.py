"""What a run writes besides checkpoints and metrics. Rank 0 writes the files; all ranks log."""

import logging
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spectral_scale import __version__
from spectral_scale.config.load import to_dict
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.files.durable import warn_of_limits
from spectral_scale.supervision.status import EXIT_CODES, saved_step, write_json, write_status

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def create_run_folder(run_dir: Path) -> None:
    """Make the folder and prove that it can be written. Raises ConfigError."""
    probe = run_dir / f".probe_{os.getpid()}"
    try:
        for folder in (run_dir, run_dir / "checkpoints", run_dir / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"spectral_scale")
        warn_of_limits(run_dir)
        probe.unlink(missing_ok=True)  # a rank of another host may have the same process id
    except OSError as error:
        raise ConfigError(
            f"train.run_dir={run_dir} cannot be written ({error.strerror}); "
            "give a folder you may write to"
        ) from None


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write config.yaml, the resolved configuration; it can be passed to --config again."""
    import yaml

    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    (run_dir / "config.yaml").write_text(text, encoding="utf-8")


def write_environment(run_dir: Path, facts: dict[str, Any]) -> None:
    """Write environment.json: an allow-list of versions and machine facts, never os.environ."""
    versions = {"spectral_scale": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    machine = {
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "byte_order": sys.byteorder,
    }
    write_json(run_dir / "environment.json", {"versions": versions, "machine": machine} | facts)


def write_failure(run_dir: Path, *, steps: int, reason: str, exit_code: int = 1) -> None:
    """Write status.json of a run that failed, with the step of its newest checkpoint."""
    write_status(
        run_dir,
        "failed",
        step=saved_step(run_dir),
        steps=steps,
        reason=reason,
        exit_code=exit_code,
        requeue=exit_code == EXIT_CODES["stopped"],
    )


def log_to_file(run_dir: Path, rank: int) -> logging.Handler:
    """Append the package's log records of this rank to logs/rank_00000.log."""
    handler = logging.FileHandler(
        run_dir / "logs" / f"rank_{rank:05d}.log", encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("spectral_scale")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler
