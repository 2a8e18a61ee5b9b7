"""Parameters into optimizer groups: every trainable one in exactly one group, by its part."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.table import parameter_table

REFERENCE_WIDTH = 768
"""Rows at which `direction_lr_scaling: width` leaves the learning rate as it is."""
VALUE_LR_FACTOR = 10.0
"""FRoD's published learning rates of lambda over those of S."""
SPECTRAL_KINDS = ("spectral_direction", "spectral_value", "low_rank", "frod_mixing", "frod_value")
"""Kinds of group that train at `spectral_lr`, `frod_value` at `value_lr`."""


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    spectral_lr: float,
    weight_decay: float = 0.0,
    spectral_weight_decay: float = 0.0,
    direction_lr_scaling: str = "none",
    value_lr: float | Literal["auto"] = "auto",
) -> list[dict[str, Any]]:
    """Groups for torch.optim.AdamW: those of dense, dense_no_decay, spectral_direction,
    spectral_value, low_rank (the factors of LoRA), frod_mixing and frod_value (the entries of S
    and the change of lambda of FRoD; `auto` is ten times spectral_lr) that the model has.

    Each holds `params`, their `fqns`, `name`, `lr`, `base_lr`, `weight_decay` (that of dense
    matrices; singular values have `spectral_weight_decay`, others none) and `spectral` (whose lr
    the controller ramps after each swap). With `width` scaling the
    directions form one group for each number of rows m, at spectral_lr * sqrt(768 / m): an Adam
    step turns a unit vector by about lr * sqrt(m).
    """
    by_name: dict[str, list[str]] = {}
    for fqn, info in parameter_table(model).items():
        if info.trainable:
            name = _group_name(info.role, info.global_shape, direction_lr_scaling)
            by_name.setdefault(name, []).append(fqn)
    if not by_name:
        raise ConfigError("the model has no trainable parameter")
    parameters = dict(model.named_parameters())
    decays = {"dense": weight_decay, "spectral_value": spectral_weight_decay}
    groups = []
    for name, fqns in sorted(by_name.items()):
        spectral = group_kind(name) in SPECTRAL_KINDS
        peak = (spectral_lr if spectral else lr) * _width_factor(name)
        if name == "frod_value":
            peak = VALUE_LR_FACTOR * spectral_lr if value_lr == "auto" else value_lr
        groups.append(
            {
                "name": name,
                "fqns": fqns,
                "params": [parameters[fqn] for fqn in fqns],
                "lr": peak,
                "base_lr": peak,
                "weight_decay": decays.get(name, 0.0),
                "spectral": spectral,
            }
        )
    return groups


def group_kind(name: str) -> str:
    """The part a group plays in metrics and clipping: dense, spectral_direction, low_rank, ..."""
    return "dense" if name.startswith("dense") else name.partition("/")[0]


def kinds(groups: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups by kind, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        found.setdefault(group_kind(group["name"]), []).append(group)
    return found


def _group_name(role: str, shape: Sequence[int], direction_lr_scaling: str) -> str:
    if role == "direction":
        suffix = f"/{shape[0]}" if direction_lr_scaling == "width" else ""
        return "spectral_direction" + suffix
    names = {
        "value": "spectral_value",
        "factor": "low_rank",
        "mixing": "frod_mixing",
        "value_delta": "frod_value",
        "matrix": "dense",
        "vector": "dense_no_decay",
    }
    return names[role]


def _width_factor(name: str) -> float:
    _, slash, rows = name.partition("/")
    return math.sqrt(REFERENCE_WIDTH / int(rows)) if slash else 1.0
