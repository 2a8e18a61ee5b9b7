"""Spectral layers of a GPTModel back into megatron-core's dense ones."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from spectral_scale.backends.megatron.layers import (
    SpectralParallelLinear,
    SpectralRowParallelLinear,
)
from spectral_scale.errors import SpectralError


@torch.no_grad()
def merge_gpt(model: nn.Module) -> int:
    """Replace spectral layers by dense ones of the same function, in place; their number.

    Each rank merges its shard, and nothing is sent. Wrap the model anew, with a new optimizer, to
    train it further.

    Args:
        model: the GPTModel, not what wraps it.

    Raises:
        SpectralError: a layer has no values yet.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SpectralParallelLinear)}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _dense(name, layer))
    return len(layers)


def _dense(name: str, layer: SpectralParallelLinear) -> nn.Module:
    matrices: list[Any] = [layer.get_submodule(n) for n in layer.matrix_names]
    if not all(m.ready for m in matrices):
        raise SpectralError(f"{name} cannot be merged: no controller gave it values")
    weights = [m.effective_weight() for m in matrices]
    biases = [m.bias for m in matrices if m.bias is not None]
    if isinstance(layer, SpectralRowParallelLinear):
        row = RowParallelLinear(
            layer.input_size,
            layer.output_size,
            input_is_parallel=layer.input_is_parallel,
            **_common(layer, biases),
        )
        return _filled(row, layer, weights[0], biases)
    column = ColumnParallelLinear(
        layer.input_size,
        layer.output_size,
        gather_output=layer.gather_output,
        stride=2 if layer.fused == "gated" else 1,
        **_common(layer, biases),
    )
    fuse = layer.layout.fuse
    weight = fuse([w.t() for w in weights]).t()
    return _filled(column, layer, weight, [fuse(biases)] if biases else [])


def _common(layer: SpectralParallelLinear, biases: list[Tensor]) -> dict[str, Any]:
    return {
        "config": layer.config,
        "init_method": layer.init_method,
        "bias": bool(biases),
        "skip_bias_add": layer.skip_bias_add,
        "tp_group": layer.tp_group,
    }


def _filled(
    dense: Any, layer: SpectralParallelLinear, weight: Tensor, biases: list[Tensor]
) -> nn.Module:
    dense.weight.copy_(weight)
    if biases:
        dense.bias.copy_(biases[0])
    made: nn.Module = dense.train(layer.training)
    return made
