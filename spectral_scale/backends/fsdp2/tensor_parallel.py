"""Tensor parallelism of a transformers model, by the table of `parallel.tensor_parallel_table`.

Parameters that the table shards become DTensors on the tensor-parallel mesh, through torch's
`parallelize_module`; what it leaves whole stays a plain tensor, equal on every rank because its
gradient is. `fully_shard` then shards all of them over the data-parallel ranks.
"""

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from spectral_scale.errors import ConfigError, SpectralScaleError
from spectral_scale.methods.layer import FactoredLinear, factored_layers
from spectral_scale.methods.tensor_parallel import CommonInput, ShardedForward
from spectral_scale.methods.tensor_parallel_context import TensorParallelContext
from spectral_scale.models.build import tie, tied_names
from spectral_scale.ops.losses import negative_log_likelihood_sum
from spectral_scale.parallel.tensor_parallel_regions import (
    copy_to_region,
    reduce_from_region,
    start_all_reduce,
)
from spectral_scale.parallel.tensor_parallel_table import kind_of, sharded_dimension

logger = logging.getLogger(__name__)


class ShardedLogits(nn.Module):
    """A model whose ranks each hold the logits of their shard of the vocabulary.

    Only three numbers a token travel for a loss. Run backward passes inside `loss_parallel` too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Token ids (batch, sequence) -> `.logits` (batch, sequence, vocabulary), on all ranks."""
        return SimpleNamespace(logits=self.model(input_ids=input_ids).logits.full_tensor())

    def token_loss_sum(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Sum of the negative log-likelihoods of `labels` (-100: none), float32 or better, on all
        ranks."""
        logits = self.model(input_ids=input_ids).logits
        with loss_parallel():
            loss: Any = negative_log_likelihood_sum(logits, labels)
        total: Tensor = loss.to_local()
        return total


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> int:
    """Shard an OPT or LLaMA over a one-dimensional mesh, in place.

    It is on the meta device, or every rank holds the same whole values. Returns the number of
    parameters that are sharded. Raises ConfigError for a parameter without a rule in the table and
    for a layer that has no tensor-parallel form, before anything is changed.
    """
    tied = tied_names(model)
    copy_to_group = partial(copy_to_region, group=mesh.get_group())
    parents = {name.rpartition(".")[0] for name in factored_layers(model)}
    inputs = {parent: CommonInput(copy_to_group) for parent in parents}
    plan = dict(_plan(model, inputs, mesh))
    _check_sizes(model, mesh.size())
    parallelize_module(model, mesh, plan, src_data_rank=None)
    for parent, common_input in inputs.items():
        model.get_submodule(parent).register_forward_hook(common_input.forget, always_call=True)
    tie(model, tied)
    _take_local_heads(model, mesh.size())
    sharded = sum(isinstance(p, DTensor) for p in model.parameters())
    if not sharded:
        raise SpectralScaleError("tensor parallelism shards no parameter of the model")
    logger.info("tensor parallelism: %d parameters sharded over %d ranks", sharded, mesh.size())
    return sharded


def _plan(
    model: nn.Module, inputs: Mapping[str, CommonInput], mesh: DeviceMesh
) -> Iterator[tuple[str, ParallelStyle]]:
    """A style for each module with parameters of its own that the table does not leave whole;
    `inputs` are those of the parents of converted layers."""
    for name, module in model.named_modules():
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        dims = {leaf: sharded_dimension(f"{name}.{leaf}") for leaf in own}  # each must have a rule
        if all(dim is None for dim in dims.values()):
            continue
        kind = kind_of(name)
        if isinstance(module, FactoredLinear):
            context = _context(mesh, inputs[name.rpartition(".")[0]], column=kind == "column")
            yield name, _FactoredParallel(dims, ShardedForward(module, context))
        elif isinstance(module, nn.Embedding):
            yield name, RowwiseParallel(input_layouts=Replicate())
        elif kind == "vocabulary":
            yield name, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        else:
            yield name, ColwiseParallel() if kind == "column" else RowwiseParallel()


def _context(mesh: DeviceMesh, common_input: CommonInput, *, column: bool) -> TensorParallelContext:
    group = mesh.get_group()
    return TensorParallelContext(
        sharding="column_parallel" if column else "row_parallel",
        index=mesh.get_local_rank(),
        start_sum=partial(start_all_reduce, group=group),
        copy_to_region=common_input,
        reduce_from_region=partial(reduce_from_region, group=group),
        local=_local,
    )


class _FactoredParallel(ParallelStyle):
    """Shards the parameters of a converted layer and lets it compute with its shards."""

    def __init__(
        self, sharded_dims: Mapping[str, int | None], sharded_forward: ShardedForward
    ) -> None:
        super().__init__()
        self.sharded_dims, self.sharded_forward = sharded_dims, sharded_forward

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer: Any = module
        layer.sharded_forward = self.sharded_forward
        for leaf, dim in self.sharded_dims.items():
            if dim is not None:
                whole = getattr(module, leaf)
                placed = distribute_tensor(whole, device_mesh, [Shard(dim)], src_data_rank=None)
                module.register_parameter(
                    leaf, nn.Parameter(placed, requires_grad=whole.requires_grad)
                )
        return module


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _check_sizes(model: nn.Module, ranks: int) -> None:
    for fqn, parameter in model.named_parameters():
        dim = sharded_dimension(fqn)
        if dim is not None and parameter.shape[dim] % ranks:
            raise ConfigError(
                f"{fqn} of shape {tuple(parameter.shape)} cannot be sharded equally over {ranks} "
                f"ranks along dimension {dim}; change the model's sizes or parallel.tensor_parallel"
            )


def _take_local_heads(model: nn.Module, ranks: int) -> None:
    """OPT's attention counts its heads; LLaMA's takes as many as there are features."""
    for module in model.modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and hasattr(module, "q_proj"):
            module.num_heads = heads // ranks  # type: ignore[assignment]
