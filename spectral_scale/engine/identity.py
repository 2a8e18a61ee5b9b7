"""The identity of a run: settings that must be the same to continue from a checkpoint."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from spectral_scale.config.load import to_dict
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.presets import Architecture
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.data.loader import TrainLoader
from spectral_scale.errors import ResumeMismatchError
from spectral_scale.models.weights import InitialWeights
from spectral_scale.optim.schedules import lr_factor
from spectral_scale.parallel.collective import Collective

LEAST_JUMP = 0.01
"""A relative change of a learning rate on resume that is worth a warning."""
FREE_KEYS = {
    "spectral.bank_device",
    "optimizer.lr",
    "optimizer.spectral_lr",
    "optimizer.value_lr",
    "optimizer.weight_decay",
    "optimizer.spectral_weight_decay",
    "optimizer.clip_grad_norm",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.min_lr_ratio",
}
"""Keys of the compared sections that may change on resume without being named."""
SINCE = {
    "spectral.form": "sst",
    "spectral.basis": "auto",
    "spectral.residual_dtype": "auto",
    "spectral.initialization": "svd",
    "spectral.train_also": [],
    "optimizer.muon_momentum": 0.95,
}
"""Keys that older checkpoints do not hold -> the value that such checkpoints stand for, at which
the key is left out."""


def model_identity(
    config: RunConfig, architecture: Architecture, method: MethodSpec
) -> dict[str, Any]:
    """The part of the identity that decides what weights a checkpoint holds."""
    facts: dict[str, Any] = {
        f"model.{key}": value for key, value in dataclasses.asdict(architecture).items()
    }
    spectral = config.spectral
    keys = ("method", *method.layout_keys, "targets", "train_dense")
    return facts | {f"spectral.{key}": getattr(spectral, key) for key in keys}


def run_identity(run: ResolvedRun, loader: TrainLoader) -> dict[str, Any]:
    """Flat JSON values that must be equal in a resumed run and its checkpoint."""
    config = run.config
    values = to_dict(config)
    facts = model_identity(config, run.architecture, run.method)
    facts["model.dropout"] = config.model.dropout
    facts["train.precision"] = config.train.precision
    if config.train.tf32:
        facts["train.tf32"] = True
    sections = ["spectral", "optimizer", *(["filter"] if config.filter.enabled else [])]
    for section in sections:
        for key, value in values[section].items():
            name = f"{section}.{key}"
            if name not in FREE_KEYS and not (name in SINCE and value == SINCE[name]):
                facts[name] = value
    return facts | {f"data.{key}": value for key, value in loader.state_fingerprint.items()}


def keeps_initial_weights(config: RunConfig, method: MethodSpec) -> bool:
    """Whether checkpoints leave out weights that the run never changes, so that it needs those it
    started from for as long as it lives."""
    return method.keeps_initial_weights or not config.spectral.train_dense


def base_identity(
    config: RunConfig, method: MethodSpec, weights: InitialWeights, collective: Collective
) -> dict[str, Any]:
    """The fingerprint of those weights, read by rank 0; nothing if checkpoints hold all weights.

    The folder of a model may move, but its files must stay the same. Collective.
    """
    if not keeps_initial_weights(config, method):
        return {}
    mine = weights.fingerprint() if collective.rank == 0 else None
    return {"model.weights": collective.broadcast_json(mine)}


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


def learning_rate_jump(before: RunConfig, now: RunConfig, *, applied_steps: int) -> str | None:
    """What a resumed run does to its learning rates, if its settings make them jump; else None.

    Args:
        before: the configuration of the start before this one.
        now: this start's.
        applied_steps: optimizer steps taken so far.
    """
    changes = []
    for key in ("lr", "spectral_lr"):
        old, new = (
            getattr(config.optimizer, key)
            * lr_factor(config.optimizer, applied_steps, config.train.steps)
            for config in (before, now)
        )
        if not math.isclose(old, new, rel_tol=LEAST_JUMP, abs_tol=1e-12):
            changes.append(f"optimizer.{key} {old:.4g} -> {new:.4g}")
    if not changes:
        return None
    return (
        f"learning rates jump at step {applied_steps}, since optimizer settings or train.steps "
        f"({before.train.steps} -> {now.train.steps}) changed: {', '.join(changes)}"
    )
