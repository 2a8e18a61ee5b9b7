"""The parameter table: what each parameter is, made once before anything is sharded.

Backends flatten, shard and wrap parameters; this table keeps their logical shape and their role.
A layer of a method declares the roles of its own parameters as `parameter_roles`, by their names.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Role = Literal[
    "direction",
    "value",
    "residual",
    "fixed",
    "factor",
    "base",
    "mixing",
    "value_delta",
    "mixed",
    "matrix",
    "vector",
]
"""direction: u, v; value: sigma; residual, fixed: frozen caches; factor: a low-rank factor,
base: the frozen weight it adds to; mixing, value_delta: FRoD's coefficients, mixed: the frozen
weight they change; matrix, vector: dense weights."""


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """One logical parameter."""

    fqn: str
    """Dotted name in the unwrapped model."""
    global_shape: tuple[int, ...]
    """Shape before any sharding."""
    role: Role
    """Role of the parameter in its method."""
    layer: str | None
    """The converted layer a factor belongs to; None for dense weights."""
    trainable: bool
    """Whether the optimizer sees it."""


ParameterTable = dict[str, ParameterInfo]


def logical_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter: one that ZeRO-3 has sharded looks empty otherwise."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_table(model: nn.Module) -> ParameterTable:
    """Every parameter's logical shape and role; a tied one appears under its first name."""
    table = {}
    for fqn, parameter in model.named_parameters():
        owner, _, leaf = fqn.rpartition(".")
        declared: dict[str, Role] = getattr(model.get_submodule(owner), "parameter_roles", {})
        shape = logical_shape(parameter)
        dense: Role = "matrix" if len(shape) >= 2 else "vector"
        table[fqn] = ParameterInfo(
            fqn=fqn,
            global_shape=shape,
            role=declared.get(leaf, dense),
            layer=owner if leaf in declared else None,
            trainable=parameter.requires_grad,
        )
    return table
