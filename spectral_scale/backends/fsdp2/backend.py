"""FSDP2 and HSDP: parameters sharded by torch's `fully_shard`, gathered block by block.

Trained weights are gathered and their gradients summed in their own precision (float32), frozen
ones are gathered in theirs (bf16 in bf16 runs) and never reduced. Products run under autocast, as
on the torch backend: a mixed-precision policy of FSDP would round embeddings, norms and the
residual stream too, and so train other numbers.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from transformers import PreTrainedModel

from spectral_scale.backends.base import Backend, gradients_of
from spectral_scale.backends.fsdp2.store import FSDP2Store
from spectral_scale.backends.fsdp2.tensor_parallel import ShardedLogits, apply_tensor_parallel
from spectral_scale.config.capability import shard_group_size, shards_residual
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.models.build import give_memory, set_trained_dtype
from spectral_scale.models.weights import InitialWeights, dense_names
from spectral_scale.optim.build import create_state, flag_given, obeys_flag
from spectral_scale.parallel.collective import ProcessGroup
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.dtensor_collectives import local, sum_over_shards
from spectral_scale.parallel.dtensor_layout import DTensorLayout, DTensorLayouts
from spectral_scale.parallel.group import (
    join_alone,
    join_group,
    keep_until_exit,
    leave_group,
    subgroup_backends,
)
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.parallel.shard_geometry import Rectangle
from spectral_scale.parallel.table import ParameterTable


class FSDP2Backend(Backend):
    """A model under `fully_shard`.

    Args:
        rank_info: where this process stands.
        device: `auto`, `cpu` or `cuda`.
        shard_group: ranks that share one copy of the model; fewer than all of them is HSDP.
        shard_frozen: shard frozen weights as well; else every rank holds them whole.
        tensor_parallel: neighbouring ranks that share each matrix and see the same data.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        device: str,
        *,
        shard_group: int,
        shard_frozen: bool,
        tensor_parallel: int = 1,
    ) -> None:
        self.device = pick_device(device, rank_info.local_rank)
        self.collective = join_group(rank_info.world_size, self.device)
        if rank_info.world_size == 1:
            join_alone(self.device)
        self.data_rank = rank_info.rank // tensor_parallel
        self.data_world_size = rank_info.world_size // tensor_parallel
        self._mesh = _mesh(self.device, rank_info.world_size, shard_group, tensor_parallel)
        self._tensor_parallel = tensor_parallel
        self.data_collective = self.collective
        if tensor_parallel > 1:
            # Gradients of losses on other data are all this group sums; TP ranks repeat each other.
            self.data_collective = ProcessGroup(torch.device("cpu"), self._mesh.get_group("shard"))
        self._shard_frozen = shard_frozen
        self._layouts = DTensorLayouts(self._mesh)
        self._model: nn.Module
        self._root: FSDPModule
        self._optimizer: torch.optim.Optimizer

    def make(
        self,
        model: PreTrainedModel,
        table: ParameterTable,
        weights: InitialWeights,
        *,
        dtype: torch.dtype,
        frozen_dtype: torch.dtype,
        fresh: bool,
    ) -> None:
        """Shard the meta model, then allocate this rank's shards and fill them, one by one."""
        set_trained_dtype(model, dtype)
        self.shard(model)
        give_memory(model, self.device)
        for fqn in dense_names(table, frozen_only=not fresh):
            self._fill(model.get_parameter(fqn), fqn, table[fqn].global_shape, weights)

    @torch.no_grad()
    def _fill(
        self, parameter: Tensor, fqn: str, shape: tuple[int, ...], weights: InitialWeights
    ) -> None:
        """Take this rank's part of a weight."""
        box = Rectangle((0,) * len(shape), shape)
        if isinstance(parameter, DTensor):
            box = self._layouts.of(parameter).rectangle(shape)
        if box.numel:
            local(parameter).copy_(weights.part(fqn, shape, box))

    def shard(self, model: nn.Module) -> None:
        """Cut every block, then what remains, in place; on the meta device as well."""
        # transformers' blocks return views, which nothing changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = self._mesh
        if self._tensor_parallel > 1:
            apply_tensor_parallel(model, mesh["tensor"])
            mesh = mesh["shard"]
        frozen = {p for p in model.parameters() if not p.requires_grad}
        ignored = set() if self._shard_frozen else frozen
        for module in [*transformer_blocks(model), model]:
            sharded = fully_shard(module, mesh=mesh, ignored_params=ignored)
            # The loss is this rank's share of the step's, so gradients are summed, not averaged.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        model.register_forward_hook(_free_root_after_evaluation)
        self._model, self._root = model, sharded

    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Create the optimizer's state, sharded as the parameters are."""
        self._optimizer = optimizer
        create_state(optimizer)
        self._store = FSDP2Store(self._model, optimizer, self.collective, mesh=self._mesh)
        return ShardedLogits(self._model) if self._tensor_parallel > 1 else self._model

    def store(self) -> FSDP2Store:
        """Parameters by name, scattered from and gathered to their owners."""
        return self._store

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay whole on each rank until the last micro-batch, then are summed and
        sharded."""
        self._root.set_requires_gradient_sync(last)
        self._root.set_is_last_backward(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients are summed over ranks as the backward pass leaves each block."""
        with loss_parallel() if self._tensor_parallel > 1 else nullcontext():
            loss.backward()

    def _gradients_by_kind(self) -> Mapping[str, Sequence[Tensor]]:
        return gradients_of(self._optimizer)

    def _norms_by_kind(self, gradients: Mapping[str, Sequence[Tensor]]) -> Mapping[str, Tensor]:
        """Norms over all shards: one all-reduce, of one number a kind."""
        parts = [
            (kind, layout, nn.utils.get_total_norm(map(local, members)).square())
            for kind, of_kind in gradients.items()
            for layout, members in self._by_layout(of_kind).items()
        ]
        sums = sum_over_shards([part[2] for part in parts], [part[1] for part in parts])
        totals = {kind: torch.zeros((), device=self.device) for kind in gradients}
        for (kind, _, _), square in zip(parts, sums, strict=True):
            totals[kind] = totals[kind] + square
        return {kind: total.sqrt() for kind, total in totals.items()}

    def _scale_gradients(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """Each rank scales its own shards."""
        super()._scale_gradients([local(gradient) for gradient in gradients], factor)

    def _obeys_on_device(self) -> bool:
        return obeys_flag(self._optimizer)

    def _update(self, left_out: Tensor | None) -> bool:
        with flag_given(self._optimizer, left_out):
            self._optimizer.step()
        self._drop_gradients()
        return True

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def close(self, *, failed: bool = False) -> None:
        """Leave the process group; collective unless this rank has failed."""
        leave_group(failed=failed)

    def _by_layout(self, tensors: Sequence[Tensor]) -> dict[DTensorLayout | None, list[Tensor]]:
        found: dict[DTensorLayout | None, list[Tensor]] = {}
        for tensor in tensors:
            layout = self._layouts.of(tensor) if isinstance(tensor, DTensor) else None
            found.setdefault(layout, []).append(tensor)
        return found


def open_backend(run: ResolvedRun, rank_info: RankInfo) -> FSDP2Backend:
    """Start it for a run; see `engine.backends`. Collective."""
    parallel = run.config.parallel
    return FSDP2Backend(
        rank_info,
        run.config.train.device,
        shard_group=shard_group_size(parallel, rank_info.world_size),
        shard_frozen=shards_residual(parallel),
        tensor_parallel=parallel.tensor_parallel,
    )


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of every list of modules: what is gathered and freed together."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def _free_root_after_evaluation(root: nn.Module, *_: object) -> None:
    """Without a backward pass to come, `fully_shard` would leave the root's weights whole."""
    if isinstance(root, FSDPModule) and not torch.is_grad_enabled():
        root.reshard()


def _mesh(
    device: torch.device, world_size: int, shard_group: int, tensor_parallel: int
) -> DeviceMesh:
    """All ranks in a line, or in rows that hold one copy of the model, or one matrix, each."""
    on_device = subgroup_backends(device, "copy", "shard")
    if tensor_parallel > 1:
        shape, names = (world_size // tensor_parallel, tensor_parallel), ("shard", "tensor")
        on_device = subgroup_backends(device, "tensor")  # losses and flags are summed over "shard"
    elif shard_group == world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    else:
        shape, names = (world_size // shard_group, shard_group), ("copy", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names, backend_override=on_device)
    for group in mesh.get_all_groups():
        keep_until_exit(group)
    return mesh
