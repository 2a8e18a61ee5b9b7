"""The table of tensor parallelism: along which dimension each weight is sharded.

Names are those of the transformers models and of the layers that conversion puts into them. A
column-parallel linear shards its outputs, a row-parallel one its inputs (arXiv 1909.08053, section
3). A factor is sharded where the dense weight it stands for is, and whole on every rank elsewhere.

A weight W = U diag(sigma) V^T of 6 outputs, 4 inputs and rank 2, on 2 ranks:

                      weight (6, 4)      u (6, 2)      v (4, 2)      sigma (2,)
    column-parallel   (3, 4), dim 0      (3, 2)        whole         whole
    row-parallel      (6, 2), dim 1      whole         (2, 2)        whole

Rows of U are outputs and rows of V are inputs, so that the rank's own factors multiply to its own
shard of W.

Invariant: every parameter has a rule; one without a rule is an error, never a silent replica.
"""

from typing import Literal

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import Rectangle, Shape

Kind = Literal["column", "row", "vocabulary", "whole"]

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj")
"""Linears whose outputs are sharded."""
ROW_PARALLEL = ("out_proj", "o_proj", "fc2", "down_proj")
"""Linears whose inputs are sharded; their outputs are summed over ranks."""
VOCABULARY_PARALLEL = ("embed_tokens", "lm_head")
"""Matrices of which a rank holds the rows of some tokens."""
WHOLE = ("embed_positions", "norm", "layer_norm", "layernorm", "project_in", "project_out")
"""Ends of the names of modules that every rank holds whole."""

_SHARDED_DIMS: dict[Kind, dict[str, int | None]] = {
    "column": {
        **{"weight": 0, "bias": 0, "u": 0, "v": None, "sigma": None},
        **{"residual": 0, "residual_scale": 0, "u_fixed": 0, "v_fixed": None},
        **{"base": 0, "mixing": None, "value_delta": None},
        **{"c": None, "d": 0, "u0": 0, "v0": None},
    },
    "row": {
        **{"weight": 1, "bias": None, "u": None, "v": 0, "sigma": None},
        **{"residual": 1, "residual_scale": None, "u_fixed": None, "v_fixed": 0},
        **{"base": 1, "mixing": None, "value_delta": None},
        **{"c": 0, "d": None, "u0": None, "v0": 0},
    },
    "vocabulary": {"weight": 0},
    "whole": {"weight": None, "bias": None},
}


def kind_of(module: str) -> Kind:
    """How a module, by its dotted name, is sharded. Raises ConfigError for an undeclared one."""
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
    """The dimension along which a parameter is sharded, None if every rank holds it whole.

    Raises ConfigError for a parameter without a rule: nothing is replicated by accident.
    """
    module, _, leaf = fqn.rpartition(".")
    dims = _SHARDED_DIMS[kind_of(module)]
    if leaf not in dims:
        raise ConfigError(
            f"tensor parallelism has no rule for {fqn}: of a {kind_of(module)}-parallel module it "
            f"knows {', '.join(dims)}; use parallel.tensor_parallel=1"
        )
    return dims[leaf]


def factor_sharded_dim(kind: Literal["column", "row"], leaf: str) -> int | None:
    """The dimension along which a converted linear's parameter is sharded; None if it is not."""
    return _SHARDED_DIMS[kind][leaf]


def local_rectangle(fqn: str, global_shape: Shape, *, parts: int, index: int) -> Rectangle:
    """The shard of a parameter that rank `index` of `parts` tensor-parallel ranks holds.

    Raises ConfigError if the parameter cannot be split into equal shards.
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
