"""What a checkpoint of a run holds, and what must be the same to continue from one."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from spectral_scale.checkpoint.format import TensorChunk, whole
from spectral_scale.checkpoint.manager import CheckpointReader
from spectral_scale.config.load import to_dict
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig
from spectral_scale.data.loader import TrainLoader
from spectral_scale.errors import CheckpointError, ResumeMismatchError
from spectral_scale.spectral.controller import SpectralController

FREE_KEYS = {
    "spectral.bank_device",
    "optimizer.lr",
    "optimizer.spectral_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad_norm",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.min_lr_ratio",
}
"""Keys of the compared sections that may change on resume without being named."""


def run_identity(
    config: RunConfig, architecture: Architecture, loader: TrainLoader
) -> dict[str, Any]:
    """Flat JSON facts that a resumed run must share with its checkpoint."""
    values = to_dict(config)
    facts: dict[str, Any] = {
        f"model.{key}": value for key, value in dataclasses.asdict(architecture).items()
    }
    facts["model.dropout"] = config.model.dropout
    facts["train.precision"] = config.train.precision
    for section in ("spectral", "optimizer"):
        for key, value in values[section].items():
            if f"{section}.{key}" not in FREE_KEYS:
                facts[f"{section}.{key}"] = value
    return facts | {f"data.{key}": value for key, value in loader.state_fingerprint.items()}


def check_identity(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, allowed: list[str], run_dir: str
) -> list[str]:
    """Compare a checkpoint's identity with the run's; the differences that were allowed by name.

    Raises ResumeMismatchError with every other difference.
    """
    differing = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    refused = [key for key in differing if key not in allowed]
    if refused:
        lines = [
            f"{key}: the checkpoint has {saved.get(key)!r}, this run {current.get(key)!r}"
            for key in refused
        ]
        raise ResumeMismatchError(
            f"{run_dir} holds checkpoints of a different run:\n  - "
            + "\n  - ".join(lines)
            + "\nchange the configuration back, choose another train.run_dir, or allow it with "
            f"--train.allow_changed '[{', '.join(refused)}]'"
        )
    return differing


def bank_chunks(controller: SpectralController | None) -> Iterator[TensorChunk]:
    """The triplets this rank owns. Trained values are stale here; the model's are saved too."""
    if controller is not None:
        for name, entry in controller.bank.items():
            for leaf in ("u", "sigma", "v", "active"):
                yield whole(f"bank/{name}/{leaf}", getattr(entry, leaf))


def load_bank(controller: SpectralController, reader: CheckpointReader) -> None:
    """Take over the owned triplets, and rebuild every frozen weight from them. Collective."""
    for name, owner in controller.owners.items():
        if owner == controller.collective.rank:
            leaves = {leaf: reader.read(f"bank/{name}/{leaf}") for leaf in ("u", "sigma", "v")}
            if leaves["u"].dtype != controller.bank.dtype:
                raise CheckpointError(
                    f"bank/{name} is {leaves['u'].dtype}, this run keeps {controller.bank.dtype}"
                )
            controller.bank.put(name, **leaves, active=reader.read(f"bank/{name}/active"))
    controller.reinstall_frozen()
