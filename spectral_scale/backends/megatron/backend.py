"""megatron-core: tensor parallelism within groups of neighbouring ranks, data parallelism across.

Gradients are summed by Megatron's DistributedDataParallel and `finalize_model_grads`, steps are
those of its FP32Optimizer or, with `parallel.distributed_optimizer`, its DistributedOptimizer.
Weights and moments are fp32; bf16 runs compute products under autocast and hold frozen weights in
bf16, as on the torch backend.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_scale.backends.base import Backend, gradients_of
from spectral_scale.backends.megatron.adapter import (
    GPTForward,
    build_spectral_gpt,
    recompute_layers,
    take_place,
)
from spectral_scale.backends.megatron.gradients import counted_squares, sum_partial_gradients
from spectral_scale.backends.megatron.optimizer import wrap_adamw
from spectral_scale.backends.megatron.store import MegatronStore
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.models.attention import uses_fused_attention
from spectral_scale.models.weights import InitialWeights
from spectral_scale.optim.build import create_state, flag_given, obeys_flag
from spectral_scale.optim.groups import kinds
from spectral_scale.parallel.collective import Collective, ProcessGroup
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.group import join_alone, join_group, keep_until_exit, leave_group
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.parallel.table import ParameterTable
from spectral_scale.parallel.tensor_parallel_table import local_rectangle


class MegatronBackend(Backend):
    """A GPTModel of megatron-core, which the backend makes itself."""

    def __init__(self, config: RunConfig, rank_info: RankInfo) -> None:
        self.config = config
        self.device = pick_device(config.train.device, rank_info.local_rank)
        self.collective = join_group(rank_info.world_size, self.device)
        if rank_info.world_size == 1:
            join_alone(self.device)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tensor_parallel,
            create_gloo_process_groups=False,
        )
        self._tensor = parallel_state.get_tensor_model_parallel_group()
        self._data = parallel_state.get_data_parallel_group()
        # Megatron's buffers reduce over a group that counts context-parallel ranks, too; there are
        # none, but it is another communicator, and must live as long as the buffers.
        reducing = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for group in (self._tensor, self._data, reducing):
            keep_until_exit(group)
        model_parallel_cuda_manual_seed(config.train.seed)
        self.data_rank, self.data_world_size = self._data.rank(), self._data.size()
        self.data_collective: Collective = self.collective
        if self._tensor.size() > 1:
            # All tensor-parallel ranks read the same data: what is counted over data must not be
            # counted once for each of them.
            self.data_collective = ProcessGroup(torch.device("cpu"), self._data)
        self._model: nn.Module
        self._wrapped: DistributedDataParallel
        self._optimizer: torch.optim.Optimizer
        self._wrapper: Any
        self._table: ParameterTable

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
        """Build the GPTModel and put its parameters in the place of the model's, in place."""
        parallel = self.config.parallel
        gpt = build_spectral_gpt(
            model,
            self.config.spectral,
            tensor_parallel=self._tensor.size(),
            sequence_parallel=parallel.sequence_parallel,
            completion=parallel.factor_gradients,
            fused_attention=uses_fused_attention(model),
            dtype=dtype,
            frozen_dtype=frozen_dtype,
            device=self.device,
        )
        if self.config.model.activation_checkpointing:
            recompute_layers(gpt)
        take_place(model, gpt, table)
        self._gpt, self._table = gpt, table
        if fresh:
            self._initialise_dense(model, weights)
        self.shard(model)

    def shard(self, model: nn.Module) -> None:
        """Wrap the GPTModel in Megatron's DistributedDataParallel."""
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,  # in Megatron's buckets of 40 M elements or more
            use_distributed_optimizer=self.config.parallel.distributed_optimizer,
            check_for_nan_in_grad=False,
        )
        self._model = model
        self._wrapped = DistributedDataParallel(
            config=self._gpt.config, ddp_config=settings, module=self._gpt
        )

    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Wrap the optimizer in Megatron's and create its state."""
        if not isinstance(optimizer, torch.optim.AdamW):
            raise TypeError(f"Megatron's optimizers wrap AdamW, not {type(optimizer).__name__}")
        self._wrapper = wrap_adamw(optimizer, self._wrapped, clip_grad=0.0)
        self._optimizer = optimizer
        create_state(optimizer)
        self._store = MegatronStore(self._model, self._wrapper, self.collective, self._table)
        self._wrapped.zero_grad_buffer()
        return GPTForward(self._wrapped, self._tensor)

    def store(self) -> MegatronStore:
        """Parameters by name, gathered to and scattered from their owners."""
        return self._store

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Gradients stay on each rank until the last micro-batch; in its backward pass, each
        bucket is summed as soon as its gradients are there."""
        with nullcontext() if last else self._wrapped.no_sync():
            yield
        if last:
            finalize_model_grads([self._wrapped])
            sum_partial_gradients(self._gpt.parameters(), self._tensor)
            self._wrapper.prepare_grads()

    def backward(self, loss: Tensor) -> None:
        """Every rank's gradients, into Megatron's buffers."""
        loss.backward()

    def _gradients_by_kind(self) -> Mapping[str, Sequence[Tensor]]:
        return gradients_of(self._optimizer)

    def _norms_by_kind(self, gradients: Mapping[str, Sequence[Tensor]]) -> Mapping[str, Tensor]:
        """What ranks hold whole counts once. One all-reduce of a number a kind."""
        by_kind = kinds(self._optimizer.param_groups)
        squares = torch.stack(
            [
                counted_squares(
                    (p for group in groups for p in group["params"]),
                    tensor_rank=self._tensor.rank(),
                    device=self.device,
                )
                for groups in by_kind.values()
            ]
        )
        sharded = self.config.parallel.distributed_optimizer
        dist.all_reduce(squares, group=None if sharded else self._tensor)
        return {k: s.sqrt().float() for k, s in zip(by_kind, squares, strict=True)}

    def _obeys_on_device(self) -> bool:
        return obeys_flag(self._optimizer)

    def _update(self, left_out: Tensor | None) -> bool:
        """Megatron's optimizers step the AdamW that they wrap."""
        with flag_given(self._optimizer, left_out):
            self._wrapper.step_with_ready_grads()
        self._drop_gradients()
        return True

    def _drop_gradients(self) -> None:
        self._wrapper.zero_grad()
        self._wrapped.zero_grad_buffer()

    def close(self, *, failed: bool = False) -> None:
        """Leave the process groups; collective unless this rank has failed."""
        parallel_state.destroy_model_parallel()
        leave_group(failed=failed)

    @torch.no_grad()
    def _initialise_dense(self, model: nn.Module, weights: InitialWeights) -> None:
        """Whole tensors by name, of which this rank takes its part: never a draw for a part."""
        for fqn, parameter in model.named_parameters():
            if self._table[fqn].layer is None:
                shape = self._table[fqn].global_shape
                box = local_rectangle(
                    fqn, shape, parts=self._tensor.size(), index=self._tensor.rank()
                )
                parameter.copy_(weights.part(fqn, shape, box))


def open_backend(run: ResolvedRun, rank_info: RankInfo) -> MegatronBackend:
    """Start it for a run; see `engine.backends`. Collective."""
    return MegatronBackend(run.config, rank_info)
