"""The table of tensor parallelism: along which dimension each weight is cut. Pure geometry.

Names are those of the transformers models and of the layers that conversion puts into them. A
column-parallel linear holds a part of its outputs, a row-parallel one a part of its inputs; a
factor is cut where the dense weight it stands for is cut, and whole on every rank elsewhere
(the cuts of dense weights: arXiv 1909.08053, section 3).
"""

from typing import Literal

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import Rectangle, Shape

Kind = Literal["column", "row", "vocabulary", "whole"]

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj")
"""Linears whose outputs are cut."""
ROW_PARALLEL = ("out_proj", "o_proj", "fc2", "down_proj")
"""Linears whose inputs are cut; their outputs are summed over ranks."""
VOCABULARY_PARALLEL = ("embed_tokens", "lm_head")
"""Matrices of which a rank holds the rows of some tokens."""
WHOLE = ("embed_positions", "norm", "layer_norm", "layernorm", "project_in", "project_out")
"""Ends of the names of modules that every rank holds whole."""

_CUTS: dict[Kind, dict[str, int | None]] = {
    "column": {
        **{"weight": 0, "bias": 0, "u": 0, "v": None, "sigma": None},
        **{"residual": 0, "u_fixed": 0, "v_fixed": None},
        **{"base": 0, "mixing": None, "value_delta": None},
    },
    "row": {
        **{"weight": 1, "bias": None, "u": None, "v": 0, "sigma": None},
        **{"residual": 1, "u_fixed": None, "v_fixed": 0},
        **{"base": 1, "mixing": None, "value_delta": None},
    },
    "vocabulary": {"weight": 0},
    "whole": {"weight": None, "bias": None},
}


def kind_of(module: str) -> Kind:
    """How a module, by its dotted name, is spread. Raises ConfigError for an undeclared one."""
    leaf = module.rpartition(".")[2]
    if leaf in COLUMN_PARALLEL:
        return "column"
    if leaf in ROW_PARALLEL:
        return "row"
    if leaf in VOCABULARY_PARALLEL:
        return "vocabulary"
    if leaf.endswith(WHOLE):
        return "whole"
    raise ConfigError(
        f"tensor parallelism has no rule for {module}; known are {', '.join(COLUMN_PARALLEL)}, "
        f"{', '.join(ROW_PARALLEL)}, {', '.join(VOCABULARY_PARALLEL)} and norms; use "
        "parallel.tensor_parallel=1"
    )


def sharded_dimension(fqn: str) -> int | None:
    """The dimension along which a parameter is cut, None if every rank holds it whole.

    Raises ConfigError for a parameter without a rule: nothing is replicated by accident.
    """
    module, _, leaf = fqn.rpartition(".")
    cuts = _CUTS[kind_of(module)]
    if leaf not in cuts:
        raise ConfigError(
            f"tensor parallelism has no rule for {fqn}: of a {kind_of(module)}-parallel module it "
            f"knows {', '.join(cuts)}; use parallel.tensor_parallel=1"
        )
    return cuts[leaf]


def factor_sharded_dim(kind: Literal["column", "row"], leaf: str) -> int | None:
    """The dimension along which a parameter of a converted linear is cut; None: whole."""
    return _CUTS[kind][leaf]


def local_rectangle(fqn: str, global_shape: Shape, *, parts: int, index: int) -> Rectangle:
    """The part of a parameter that rank `index` of `parts` tensor-parallel ranks holds.

    Raises ConfigError if it cannot be cut into equal parts.
    """
    dim = sharded_dimension(fqn)
    if dim is None:
        return Rectangle((0,) * len(global_shape), tuple(global_shape))
    size = global_shape[dim]
    if size % parts:
        raise ConfigError(
            f"{fqn} has {size} {'rows' if dim == 0 else 'columns'}, which {parts} tensor-parallel "
            "ranks do not divide; change the model's sizes or parallel.tensor_parallel"
        )
    length = size // parts
    offset = tuple(index * length if d == dim else 0 for d in range(len(global_shape)))
    return Rectangle(offset, tuple(length if d == dim else n for d, n in enumerate(global_shape)))
