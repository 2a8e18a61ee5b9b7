"""A GPTModel behind the names of the transformers model that it computes.

The transformers model stays as the tree of names: its parameters become this rank's shards of the
Megatron ones, so that tables, optimizer groups, checkpoints and draws speak of the same logical
tensors as on every other backend. Its own forward is never called.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spectral_scale.backends.megatron.attention import FusedAttention
from spectral_scale.backends.megatron.gpt_config import megatron_architecture, megatron_settings
from spectral_scale.backends.megatron.gpt_model import build_gpt_model
from spectral_scale.backends.megatron.gpt_weights import megatron_weights
from spectral_scale.backends.megatron.layers import (
    SpectralColumnParallelLinear,
    SpectralRowParallelLinear,
)
from spectral_scale.backends.megatron.matrix import Completion
from spectral_scale.backends.megatron.spec import spectral_gpt_block_spec
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.layer import in_product_dtype
from spectral_scale.methods.sst.layer import spectral_layers
from spectral_scale.ops.labels import IGNORED_LABEL
from spectral_scale.parallel.table import ParameterTable
from spectral_scale.parallel.tensor_parallel_table import local_rectangle, sharded_dimension


class GPTForward(nn.Module):
    """Calls the GPTModel, or what wraps it, as a transformers model is called."""

    def __init__(self, wrapped: nn.Module, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.wrapped, self._group = wrapped, group

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Token ids (batch, sequence) -> `.logits` (batch, sequence, vocabulary), on all ranks."""
        logits = self._call(input_ids, None)
        whole = gather_from_tensor_model_parallel_region(logits, group=self._group)
        return SimpleNamespace(logits=whole)

    def token_loss_sum(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Sum of the negative log-likelihoods of `labels`, float32, on all ranks.

        The logits stay sharded: each rank has those of its rows of the vocabulary.
        """
        losses: Tensor = self._call(input_ids, labels.clamp_min(0))
        return (losses * (labels != IGNORED_LABEL)).sum()

    def _call(self, input_ids: Tensor, labels: Tensor | None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        found: Tensor = self.wrapped(input_ids, positions.expand_as(input_ids), None, labels=labels)
        return found


def build_spectral_gpt(
    model: PreTrainedModel,
    spectral: SpectralConfig,
    *,
    tensor_parallel: int,
    sequence_parallel: bool,
    completion: Completion,
    fused_attention: bool,
    dtype: torch.dtype,
    frozen_dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The GPTModel of a transformers OPT or LLaMA, with spectral layers and without values.

    The parallel state must have been initialized. Raises ConfigError as `megatron_settings` and
    `spectral_gpt_layer_spec` do.
    """
    settings = megatron_settings(
        model.config,
        tensor_parallel=tensor_parallel,
        sequence_parallel=sequence_parallel,
        dtype=dtype,
        device=device,
    )
    # The loss is this rank's share of the step's, so gradients are summed, not averaged.
    settings.transformer["calculate_per_token_loss"] = True
    spec = spectral_gpt_block_spec(
        TransformerConfig(**settings.transformer),
        spectral,
        completion=completion,
        frozen_dtype=frozen_dtype,
        fused_attention=fused_attention,
    )
    gpt: Any = build_gpt_model(settings, spec).to(device)
    fused = sum(isinstance(module, FusedAttention) for module in gpt.modules())
    asked = settings.transformer["num_layers"] if fused_attention else 0
    if fused != asked:
        raise SpectralError(
            f"attention is fused in {fused} layers instead of {asked}; the installed megatron-core "
            "may name it differently: set model.attention=eager"
        )
    gpt.output_layer.register_forward_pre_hook(_cast_as_autocast)
    made: nn.Module = gpt
    return made


def recompute_layers(gpt: nn.Module) -> int:
    """Let each layer keep its input alone and compute the rest again in backward; how many do.

    By torch's checkpointing: that of megatron-core forgets autocast when it recomputes.
    """
    layers = [m for m in gpt.modules() if isinstance(m, TransformerLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return len(layers)


def take_place(model: PreTrainedModel, gpt: nn.Module, table: ParameterTable) -> int:
    """Put the GPTModel's parameters under the names of the (converted, meta) model, in place.

    Args:
        model: the tree of names.
        gpt: from `build_spectral_gpt`.
        table: the model's parameters with their whole shapes.

    Returns the number of parameters. Raises SpectralError unless every one of the model found its
    counterpart, in the shape of this rank's shard, and none of the GPTModel's is left.
    """
    made: Any = gpt
    group = made.pg_collection.tp
    weights = megatron_weights(
        megatron_architecture(model.config), parts=group.size(), index=group.rank()
    )
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        module: Any = gpt.get_submodule(owner)
        for fqn in dict.fromkeys(region.fqn for region in weight.regions):
            target = fqn.rpartition(".")[0]
            if isinstance(module, SpectralColumnParallelLinear | SpectralRowParallelLinear):
                _replace(model, target, _matrix(module, target))
            else:
                setattr(model.get_submodule(target), leaf, getattr(module, leaf))
    model.tie_weights()
    _mark_sharded(model)
    _check(model, gpt, table, parts=group.size(), index=group.rank())
    return len(table)


def _cast_as_autocast(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """megatron-core's dense linear scatters an input's gradient in the input's own precision, and
    fails under autocast if that is another one than the product's."""
    return (in_product_dtype(inputs[0]), *inputs[1:])


def _matrix(module: Any, target: str) -> nn.Module:
    leaf = target.rpartition(".")[2]
    names = module.matrix_names
    found: nn.Module = module.get_submodule(leaf if leaf in names else names[0])
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _mark_sharded(model: nn.Module) -> None:
    """Mark sharded parameters as megatron-core does when it draws initial values, which it does not
    here."""
    for fqn, parameter in model.named_parameters():
        dim = sharded_dimension(fqn)
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def _check(
    model: nn.Module, gpt: nn.Module, table: ParameterTable, *, parts: int, index: int
) -> None:
    found = dict(model.named_parameters())
    wrong = sorted(found.keys() ^ table.keys())
    for fqn in found.keys() & table.keys():
        box = local_rectangle(fqn, table[fqn].global_shape, parts=parts, index=index)
        if tuple(found[fqn].shape) != box.shape:
            wrong.append(f"{fqn} of shape {tuple(found[fqn].shape)} instead of {box.shape}")
    ours = {id(p) for p in found.values()}
    wrong += [f"{n} of the GPTModel" for n, p in gpt.named_parameters() if id(p) not in ours]
    if wrong or not spectral_layers(model):
        raise SpectralError(
            f"{len(wrong)} parameters have no counterpart between transformers and megatron-core: "
            f"{wrong[:5]}; the installed versions may name or fuse them differently"
        )
