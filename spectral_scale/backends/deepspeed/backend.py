"""DeepSpeed's ZeRO stages, with and without optimizer state on the CPU.

DeepSpeed shards, reduces and steps; scaling of the loss, clipping, state and checkpoints are ours,
so that a run means the same here as on any other backend.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_scale.backends.base import Backend
from spectral_scale.backends.deepspeed import cpu_adam, loss_scale
from spectral_scale.backends.deepspeed.clipping import gradients_by_kind, norms_by_kind, scale
from spectral_scale.backends.deepspeed.cpu_adam import offloaded_adam
from spectral_scale.backends.deepspeed.optimizer_state import without_update
from spectral_scale.backends.deepspeed.profiling import (
    count_products_in_place,
    log_level,
    print_traffic,
)
from spectral_scale.backends.deepspeed.start import allocate_shards, initialise
from spectral_scale.backends.deepspeed.store import ZeroStore
from spectral_scale.config.capability import zero_stage
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.errors import ConfigError, SpectralScaleError
from spectral_scale.models.build import give_memory
from spectral_scale.models.weights import InitialWeights, dense_names
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.group import join_alone, join_group, keep_until_exit, leave_group
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.parallel.table import ParameterTable

RESOLVED_NAME = "ds_config.json"
"""The file in the run folder that holds the settings DeepSpeed was initialized with."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""train.precision -> dtype of the module's weights."""


class DeepSpeedBackend(Backend):
    """A DeepSpeed engine."""

    def __init__(self, run: ResolvedRun, rank_info: RankInfo) -> None:
        config = run.config
        if run.deepspeed is None:
            raise ConfigError(
                f"DeepSpeed was given a run with parallel.backend={config.parallel.backend}; "
                "resolve one with parallel.backend=deepspeed"
            )
        self.device = pick_device(config.train.device, rank_info.local_rank)
        self.collective = join_group(rank_info.world_size, self.device)
        if rank_info.world_size == 1:
            join_alone(self.device)  # the engine reduces over one rank, too
        self.data_rank, self.data_world_size = rank_info.rank, rank_info.world_size
        self.data_collective = self.collective
        self._config = config
        self.deepspeed_config = deepcopy(run.deepspeed.initialize)
        self._cpu_adam = run.deepspeed.cpu_adam
        self._deepspeed = _import_deepspeed(
            self.device, rank_info, log_level(self.deepspeed_config)
        )
        _require_precision(self._deepspeed, config.train.precision, self.device)
        self._last = True
        self._model: nn.Module
        self._engine: Any
        self._store: ZeroStore
        self._initial: Callable[[ZeroStore], None] = lambda _: None
        self._scaler: Any = None

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
        """Give the model memory in the engine's precision; values follow in `attach`, into the
        masters, which would else be copies of rounded weights.

        ZeRO-3 shards each parameter before the next one gets memory.
        """
        for parameter in model.parameters():
            parameter.data = parameter.data.to(PRECISIONS[self._config.train.precision])
        if zero_stage(self._config.parallel) == 3:
            allocate_shards(self._deepspeed, model, self.deepspeed_config, self.device)
        else:
            give_memory(model, self.device)
        names = dense_names(table, frozen_only=not fresh)
        self._initial = partial(initialise, weights, {n: table[n].global_shape for n in names})
        self.shard(model)

    def shard(self, model: nn.Module) -> None:
        """The engine takes it when it gets the optimizer."""
        self._model = model

    def own_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """DeepSpeed's Adam for state on the CPU, where it is wanted and can be built."""
        if self._config.parallel.offload == "none" or not isinstance(optimizer, torch.optim.AdamW):
            return optimizer
        found = offloaded_adam(self._deepspeed, optimizer, self.collective, wanted=self._cpu_adam)
        self.deepspeed_config[cpu_adam.KEY] = cpu_adam.is_cpu_adam(found)
        return found

    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Initialize the engine; it computes in the run's precision and keeps fp32 masters."""
        self._save_resolved()
        if self._config.model.compile and zero_stage(self._config.parallel) == 3:
            gather_whole_blocks(self._model)
        self._engine, *_ = self._deepspeed.initialize(
            model=self._model, optimizer=optimizer, config=self.deepspeed_config
        )
        # DeepSpeed's own copies of the group of all ranks, in which it reduces.
        keep_until_exit(self._engine.data_parallel_group)
        keep_until_exit(self._engine.seq_data_parallel_group)
        if self._measures("flops_profiler"):
            count_products_in_place(self._model)
        self._store = ZeroStore(self._engine, self.collective)
        self._store.register_step_hooks()
        if self._config.train.precision == "fp16":
            self._scaler = self._engine.optimizer.loss_scaler
        self._initial(self._store)
        engine: nn.Module = self._engine
        return engine

    def store(self) -> ZeroStore:
        """Masters, weights and moments by the names of the model."""
        return self._store

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """DeepSpeed reduces by its own count of micro-batches, which must agree."""
        self._last = last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over ranks, so the loss is scaled up to make it a sum."""
        self._engine.backward(loss * self.collective.world_size, scale_wrt_gas=False)
        if not self._last:
            self._engine.step()  # counts the micro-batch, no more

    def _loss_scale(self) -> float | None:
        return None if self._scaler is None else self._scale()

    def _scale(self) -> float:
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def _gradients_by_kind(self) -> Mapping[str, Sequence[Tensor]]:
        if not self._engine.is_gradient_accumulation_boundary():
            raise RuntimeError("DeepSpeed expects more micro-batches before the optimizer step")
        return gradients_by_kind(self._store)

    def _norms_by_kind(self, gradients: Mapping[str, Sequence[Tensor]]) -> Mapping[str, Tensor]:
        return norms_by_kind(self._store, gradients, loss_scale=self._scale())

    def _skip_overflow(self, norms: Mapping[str, Tensor]) -> bool:
        """Let DeepSpeed drop the gradients and lower the loss scale."""
        if self._scaler is None or loss_scale.all_finite(norms):
            return False
        if loss_scale.cannot_lower(self._scaler):
            raise SpectralScaleError(
                f"fp16 gradients overflow at loss scale {self._scale():g}, the smallest allowed; "
                "lower the learning rates, lower fp16.loss_scale or fp16.min_loss_scale of the "
                "DeepSpeed JSON, or train in bf16, then start again to resume"
            )
        self._engine.step()
        if self._engine.was_step_applied():
            raise SpectralScaleError(
                "DeepSpeed applied a step whose gradients had overflowed in fp16; start again to "
                "resume from the last checkpoint, and report this"
            )
        return True

    def _clip_factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """Norms that are not finite clip nothing: DeepSpeed then skips the step, or the run
        stops."""
        return torch.where(norm.isfinite(), super()._clip_factor(norm, max_norm), 1.0)

    def _scale_gradients(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """Offloaded gradients are on the CPU."""
        scale(gradients, factor)

    def _update(self, left_out: Tensor | None) -> bool:
        """DeepSpeed updates masters and weights, and clears the gradients."""
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if self._scaler is not None and not applied:
            raise SpectralScaleError(
                "DeepSpeed skipped a step as overflowed whose gradient norms are finite; start "
                "again to resume from the last checkpoint, and report this"
            )
        return applied

    def _drop_gradients(self) -> None:
        """DeepSpeed clears the gradients and counts micro-batches, no more."""
        with without_update(self._store.inner):
            self._engine.step()

    def state_chunks(self) -> Iterator[TensorChunk]:
        """Masters and moments, each shard from the rank that keeps it, and fp16's loss scale."""
        yield from super().state_chunks()
        if self._scaler is not None and self.collective.rank == 0:
            yield from loss_scale.state_chunks(self._scaler)

    def load_state(self, read: ReadTensor) -> None:
        """Masters, the module's weights, moments and loss scale, in place."""
        super().load_state(read)
        if self._scaler is not None:
            loss_scale.load_state(self._scaler, read)

    def _save_resolved(self) -> None:
        if self.collective.rank == 0:
            path = Path(self._config.train.run_dir) / RESOLVED_NAME
            text = json.dumps(self.deepspeed_config, indent=2, sort_keys=True) + "\n"
            path.write_text(text, encoding="utf-8")

    def close(self, *, failed: bool = False) -> None:
        """Leave the process group; collective unless this rank has failed."""
        if not failed and self._measures("comms_logger"):
            print_traffic(self._deepspeed)
        leave_group(failed=failed)

    def _measures(self, section: str) -> bool:
        return bool(self.deepspeed_config.get(section, {}).get("enabled"))


def open_backend(run: ResolvedRun, rank_info: RankInfo) -> DeepSpeedBackend:
    """Start DeepSpeed. Collective. Raises ConfigError."""
    return DeepSpeedBackend(run, rank_info)


def _require_precision(deepspeed: Any, precision: str, device: torch.device) -> None:
    """Raise ConfigError if DeepSpeed refuses the precision on this device."""
    accelerator = deepspeed.accelerator.get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if precision in supported and not supported[precision]():
        others = [p for p, check in supported.items() if check()]
        raise ConfigError(
            f"train.precision={precision}: DeepSpeed does not support it on this {device.type}; "
            f"set train.precision to one of {['fp32', *others]}"
        )


def gather_whole_blocks(model: nn.Module) -> None:
    """Have ZeRO-3 gather the weights of each transformer block together, around its forward pass,
    instead of linear by linear inside it, where its hooks would break up a compiled block."""
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                set_z3_leaf_module(block, True)


def _import_deepspeed(device: torch.device, rank_info: RankInfo, level: int) -> Any:
    """DeepSpeed, told which device to use, and how loud to be."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed takes the GPU of this number, which is not the rank's where it sees only its own.
    os.environ["LOCAL_RANK"] = str(rank_info.local_rank if device.index is None else device.index)
    import deepspeed
    from deepspeed.utils import logger as chatter

    chatter.setLevel(level)
    if device.type == "cpu":
        # Its shared-memory collectives are compiled at every machine's first start, and sum in an
        # order of their own; gloo is there already.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
