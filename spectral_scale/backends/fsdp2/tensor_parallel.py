"""Tensor parallelism of a transformers model, by the table of `parallel.tensor_parallel_table`.

Parameters that the table cuts become DTensors on the tensor-parallel mesh, through torch's
`parallelize_module`; what it leaves whole stays a plain tensor, equal on every rank because its
gradient is. `fully_shard` then cuts all of them over the data-parallel ranks.
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
from spectral_scale.methods.sst.product import Bottleneck
from spectral_scale.methods.tensor_parallel import compute_sharded
from spectral_scale.methods.tensor_parallel_context import CommonInput, TensorParallelContext
from spectral_scale.ops.losses import negative_log_likelihood_sum
from spectral_scale.parallel.tensor_parallel_regions import (
    all_reduce,
    copy_to_region,
    reduce_from_region,
)
from spectral_scale.parallel.tensor_parallel_table import kind_of, sharded_dimension

logger = logging.getLogger(__name__)


class ShardedLogits(nn.Module):
    """A model whose ranks each hold the logits of a part of the vocabulary.

    Only three numbers a token travel for a loss. Backward passes belong into `loss_parallel`, too.
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
    """Cut a materialised OPT or LLaMA over a one-dimensional mesh, in place; the matrices cut.

    Every rank must hold the same whole values. Raises ConfigError for a parameter without a rule
    in the table and for a layer that has no tensor-parallel form, before anything is changed.
    """
    tied = _tied_names(model)
    copy_to_group = partial(copy_to_region, group=mesh.get_group())
    parents = {name.rpartition(".")[0] for name in factored_layers(model)}
    inputs = {parent: CommonInput(copy_to_group) for parent in parents}
    plan = dict(_plan(model, inputs))
    _check_sizes(model, mesh.size())
    parallelize_module(model, mesh, plan, src_data_rank=None)
    for parent, shared in inputs.items():
        model.get_submodule(parent).register_forward_hook(shared.forget, always_call=True)
    for fqn, first in tied.items():
        owner, _, leaf = fqn.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    _take_local_heads(model, mesh.size())
    cut = sum(isinstance(p, DTensor) for p in model.parameters())
    if not cut:
        raise SpectralScaleError("tensor parallelism cut no parameter of the model")
    logger.info("tensor parallelism: %d parameters cut over %d ranks", cut, mesh.size())
    return cut


def _plan(
    model: nn.Module, inputs: Mapping[str, CommonInput]
) -> Iterator[tuple[str, ParallelStyle]]:
    """A style for each module with parameters of its own that the table does not leave whole;
    `inputs` are those of the parents of converted layers."""
    for name, module in model.named_modules():
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        cut = [sharded_dimension(f"{name}.{leaf}") for leaf in own]  # each must have a rule
        if all(dim is None for dim in cut):
            continue
        kind = kind_of(name)
        if isinstance(module, FactoredLinear):
            shared = inputs[name.rpartition(".")[0]]
            yield name, _SharedLayer(kind == "column", dict(zip(own, cut, strict=True)), shared)
        elif isinstance(module, nn.Embedding):
            yield name, RowwiseParallel(input_layouts=Replicate())
        elif kind == "vocabulary":
            yield name, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        else:
            yield name, ColwiseParallel() if kind == "column" else RowwiseParallel()


class _SharedLayer(ParallelStyle):
    """Cuts the parameters of an SST or FRoD layer and lets it compute its part."""

    def __init__(
        self,
        column_parallel: bool,
        sharded_dims: dict[str, int | None],
        common_input: CommonInput,
    ) -> None:
        super().__init__()
        self.column_parallel, self.sharded_dims = column_parallel, sharded_dims
        self.common_input = common_input

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        shared = Bottleneck(
            "column_parallel" if self.column_parallel else "row_parallel",
            partial(all_reduce, group=group),
        )
        context = TensorParallelContext(
            shared,
            self.common_input,
            partial(reduce_from_region, group=group),
            _local,
            device_mesh.get_local_rank(),
        )
        layer: Any = module
        compute_sharded(layer, context)
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


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Further name of a shared parameter -> its first one."""
    first: dict[int, str] = {}
    tied = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), fqn) != fqn:
            tied[fqn] = first[id(parameter)]
    return tied


def _check_sizes(model: nn.Module, parts: int) -> None:
    for fqn, parameter in model.named_parameters():
        dim = sharded_dimension(fqn)
        if dim is not None and parameter.shape[dim] % parts:
            raise ConfigError(
                f"{fqn} of shape {tuple(parameter.shape)} cannot be cut into {parts} equal parts "
                f"along dimension {dim}; change the model's sizes or parallel.tensor_parallel"
            )


def _take_local_heads(model: nn.Module, parts: int) -> None:
    """OPT's attention counts its heads; LLaMA's takes as many as there are features."""
    for module in model.modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and hasattr(module, "q_proj"):
            module.num_heads = heads // parts  # type: ignore[assignment]
