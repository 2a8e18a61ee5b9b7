"""How a model gets memory and first values behind DeepSpeed, without ever being whole on a rank.

ZeRO-3 shards a parameter as soon as it has memory, so that a rank holds its shards and one
parameter. Values come after `deepspeed.initialize`, into masters and weights alike.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectral_scale.backends.deepspeed.store import ZeroStore
from spectral_scale.models.build import restore_buffers, tie, tied_names
from spectral_scale.models.weights import InitialWeights
from spectral_scale.parallel.shard_geometry import Rectangle, Shape


def allocate_shards(
    deepspeed: Any, model: PreTrainedModel, config: dict[str, Any], device: torch.device
) -> None:
    """Allocate a meta model's parameters and shard each over all ranks, in place; values are
    undefined. Collective.

    Args:
        deepspeed: the package.
        model: its parameters have the precision that the engine trains in.
        config: what the engine will be initialized with.
        device: of the engine.
    """
    # As `initialize` would: before that, a DeepSpeed configuration counts one rank.
    wire = deepspeed.accelerator.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=wire)
    tied = tied_names(model)
    first: Any = None
    for fqn, meta in list(model.named_parameters()):
        whole = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        parameter = nn.Parameter(whole, requires_grad=meta.requires_grad)
        del whole
        owner, _, leaf = fqn.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
        if first is None:  # a module of one parameter, which brings the means to shard others
            deepspeed.zero.Init(
                nn.ParameterList([parameter]), config_dict_or_path=config, dtype=meta.dtype
            )
            first = parameter
        else:
            first.convert_to_zero_parameters([parameter])
    tie(model, tied)
    restore_buffers(model, device)


@torch.no_grad()
def initialise(weights: InitialWeights, shapes: Mapping[str, Shape], store: ZeroStore) -> None:
    """Write initial weights into the masters and the module's weights: of each parameter the range
    that this rank keeps of it. Collective."""
    for fqn, shape in shapes.items():
        start, numel = store.weight_range(fqn)
        inner = prod(shape[1:])
        first, last = start // inner, -(-(start + numel) // inner)
        part = torch.empty(0)
        if numel:
            rows = Rectangle((first,) + (0,) * len(shape[1:]), (last - first, *shape[1:]))
            part = weights.part(fqn, shape, rows).reshape(-1)[start - first * inner :][:numel]
        store.write(fqn, part)
