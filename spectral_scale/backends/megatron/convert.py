"""A dense megatron-core model into one with spectral layers, and fresh whole weights."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from spectral_scale.backends.megatron.fused import Fused
from spectral_scale.backends.megatron.layers import (
    SpectralColumnParallelLinear,
    SpectralParallelLinear,
    SpectralRowParallelLinear,
    bound,
)
from spectral_scale.backends.megatron.matrix import Completion, MatrixSettings, SpectralMatrix
from spectral_scale.backends.megatron.spec import unsupported
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError
from spectral_scale.methods.sst.layer import spectral_layers
from spectral_scale.ops.keyed_random import keyed_seed

logger = logging.getLogger(__name__)

FUSED: dict[str, Fused] = {"linear_qkv": "qkv", "linear_fc1": "none"}
"""Column-parallel linears of a transformer layer, and what their weight fuses."""
ROWS = ("linear_proj", "linear_fc2")
"""Row-parallel linears of a transformer layer."""


@torch.no_grad()
def convert_gpt(
    model: nn.Module,
    spectral: SpectralConfig,
    *,
    completion: Completion = "bottleneck",
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, SpectralMatrix]:
    """Replace the linears of every layer of a GPTModel, in place; the new matrices by name.

    Before it is wrapped in DistributedDataParallel. Each rank's shard of a dense weight waits until
    `MegatronStore.initial_weights` gathers it for the controller; biases move over.

    Args:
        model: with values, at any tensor-parallel size.
        spectral: the method's settings.
        completion: see `MatrixSettings`.
        frozen_dtype: of frozen weights; None: that of the model's parameters.

    Raises:
        ConfigError: no such linear, a linear of Transformer Engine, or an unsupported option.
    """
    config: Any = model.config
    if problems := list(unsupported(config)):
        raise ConfigError("the model cannot be converted:\n  - " + "\n  - ".join(problems))
    settings = MatrixSettings(spectral=spectral, completion=completion, frozen_dtype=frozen_dtype)
    wanted = (*FUSED, *ROWS)
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in wanted]
    if not names:
        raise ConfigError(f"the model has no {', '.join(wanted)}; is it a GPTModel?")
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = _replaced(name, model.get_submodule(name), settings, config)
        setattr(model.get_submodule(parent), child, linear)
    matrices = {n: m for n, m in spectral_layers(model).items() if isinstance(m, SpectralMatrix)}
    logger.info("converted %d linears into %d spectral matrices", len(names), len(matrices))
    return matrices


def fresh_weights(model: nn.Module, seed: int) -> Callable[[str], Tensor]:
    """Initial dense weights (out, in) of layers that a spectral spec built, by matrix name.

    Drawn on the owner by the layer's own `init_method`, for the whole matrix and from the seed and
    the name alone: independent of the number of ranks, unlike a draw for each shard.
    """

    def weight(name: str) -> Tensor:
        parent, _, _ = name.rpartition(".")
        layer: Any = model.get_submodule(parent)
        matrix: Any = model.get_submodule(name)
        drawn = torch.empty(matrix.out_features, matrix.in_features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, "initial", name))
            layer.init_method(drawn)
        return drawn

    return weight


def _replaced(
    name: str, dense: Any, settings: MatrixSettings, config: Any
) -> SpectralParallelLinear:
    child = name.rpartition(".")[2]
    layer: SpectralParallelLinear
    common: dict[str, Any] = {"config": config, "init_method": config.init_method}
    if type(dense) is ColumnParallelLinear and child in FUSED:
        gated = child == "linear_fc1" and config.gated_linear_unit
        made = bound(SpectralColumnParallelLinear, settings, "gated" if gated else FUSED[child])
        layer = made(
            dense.input_size,
            dense.output_size,
            bias=dense.bias is not None,
            gather_output=dense.gather_output,
            skip_bias_add=dense.skip_bias_add,
            tp_group=dense.tp_group,
            **common,
        )
        weights = layer.layout.split(dense.weight)
        biases = {} if dense.bias is None else layer.layout.split(dense.bias)
    elif type(dense) is RowParallelLinear and child in ROWS:
        layer = bound(SpectralRowParallelLinear, settings)(
            dense.input_size,
            dense.output_size,
            bias=dense.bias is not None,
            input_is_parallel=dense.input_is_parallel,
            skip_bias_add=dense.skip_bias_add,
            tp_group=dense.tp_group,
            **common,
        )
        weights = {"matrix": dense.weight}
        biases = {} if dense.bias is None else {"matrix": dense.bias}
    else:
        raise ConfigError(
            f"{name} is a {type(dense).__name__}: only megatron-core's own ColumnParallelLinear "
            "and RowParallelLinear are converted; build the model with get_gpt_layer_local_spec"
        )
    for matrix, weight in weights.items():
        layer.get_submodule(matrix).initial_shard = weight.detach()
    for matrix, bias in biases.items():
        layer.get_submodule(matrix).bias.copy_(bias)
    return layer
