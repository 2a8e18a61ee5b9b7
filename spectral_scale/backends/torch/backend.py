"""One process, or DistributedDataParallel: every rank holds every parameter whole."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spectral_scale.backends.base import Backend, gradients_of
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.optim.build import create_state, flag_given, obeys_flag
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.group import join_group, leave_group
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.parallel.store import TorchStore


class TorchBackend(Backend):
    """Plain torch."""

    def __init__(self, rank_info: RankInfo, device: str) -> None:
        self.device = pick_device(device, rank_info.local_rank)
        self.collective = join_group(rank_info.world_size, self.device)
        self.data_rank, self.data_world_size = rank_info.rank, rank_info.world_size
        self.data_collective = self.collective
        self._model: nn.Module
        self._wrapped: nn.Module
        self._optimizer: torch.optim.Optimizer

    def shard(self, model: nn.Module) -> None:
        """Nothing is sharded: every rank keeps the whole model."""
        self._model = model

    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Create the optimizer's state, and wrap the model if there is more than one rank."""
        self._optimizer = optimizer
        create_state(optimizer)
        self._store = TorchStore(self._model, optimizer, self.collective)
        self._wrapped = self._model
        if self.collective.world_size > 1:
            self._wrapped = DistributedDataParallel(
                self._model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
        return self._wrapped

    def store(self) -> TorchStore:
        """Whole parameters and their moments."""
        return self._store

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """DDP reduces gradients in the last micro-batch only."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """DDP averages over ranks, so the loss is scaled up to make it a sum."""
        scale = self.collective.world_size
        (loss * scale if scale > 1 else loss).backward()

    def _gradients_by_kind(self) -> Mapping[str, Sequence[Tensor]]:
        return gradients_of(self._optimizer)

    def _norms_by_kind(self, gradients: Mapping[str, Sequence[Tensor]]) -> Mapping[str, Tensor]:
        """Every rank has whole gradients, so nothing is sent."""
        return {kind: nn.utils.get_total_norm(members) for kind, members in gradients.items()}

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
        """Leave the process group, if there is one; collective unless this rank has failed."""
        leave_group(failed=failed)


def open_backend(run: ResolvedRun, rank_info: RankInfo) -> TorchBackend:
    """Start it for a run; see `engine.backends`."""
    return TorchBackend(rank_info, run.config.train.device)
