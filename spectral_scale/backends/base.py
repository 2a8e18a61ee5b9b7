"""What the training loop sees of a host, whatever the host does with parameters."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_scale.models.weights import InitialWeights
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore
from spectral_scale.parallel.table import ParameterTable

Accept = Callable[[Mapping[str, Tensor]], bool]
"""Given a step's gradient norms by group kind, whether it may be applied; alike on all ranks."""
Replicated = tuple[str, Tensor, int]
"""Name, this rank's tensor, and which piece of the whole it is (0 if it is the whole)."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Outcome of one optimizer step."""

    applied: bool
    """False if it was refused or skipped by the host (an overflow); no counter may then advance."""
    grad_norms: Mapping[str, Tensor]
    """Norm of the averaged gradient before clipping, by group kind; 0-dim tensors."""
    loss_scale: float | None = None
    """What the step's loss was multiplied by, where fp16 needs it."""
    overflowed: bool = False
    """Not applied because gradients overflowed in fp16, so that norms are not finite. No fault of
    the run: the host lowers the loss scale and goes on, and `accept` was not asked."""


@runtime_checkable
class OptimizerOwner(Protocol):
    """A backend that may step an optimizer of its own."""

    def own_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """What to attach in place of `optimizer`, over the same groups; or `optimizer`.

        Collective. Raises ConfigError if the configuration demands one that cannot be had.
        """


class Backend(Protocol):
    """Set up, shard, attach, backward, step, state in and out, close, in that order.

    All methods are collective.
    """

    collective: Collective
    device: torch.device
    data_rank: int
    data_world_size: int
    data_collective: Collective
    """One rank for each data rank: sums over it count every batch once."""

    def shard(self, model: nn.Module) -> None:
        """Take the materialised model over, in place; before the optimizer is built."""

    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Take the optimizer over; the module that forward is called on."""

    def store(self) -> ParameterStore:
        """Access to logical parameters for the spectral controller."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch; gradients are reduced across ranks in the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss whose sum over ranks and micro-batches is the step's."""

    def step(self, *, clip_grad_norm: float, accept: Accept | None = None) -> StepStats:
        """Clip each group kind by its own norm, update, and clear the gradients.

        `accept` is asked after the norms are known and before anything changes. If it refuses,
        the gradients are dropped and weights, moments and step counts stay as they are, bit for
        bit.
        """

    def state_chunks(self) -> Iterator[TensorChunk]:
        """What this rank writes to a checkpoint: `model/<fqn>` and `optimizer/<fqn>/<key>`."""

    def replicated(self) -> Iterator[Replicated]:
        """What other ranks hold, too: pieces of one name and place are equal, bit for bit."""

    def load_state(self, read: ReadTensor) -> None:
        """Overwrite trained parameters and optimizer state, in place, from a checkpoint."""

    def close(self, *, failed: bool = False) -> None:
        """Leave the process group; collective unless this rank has failed."""


@runtime_checkable
class ModelMaker(Protocol):
    """A backend with modules of its own, which takes the model before it has memory."""

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
        """Put this rank's own parameters under the names of the (converted) meta model, in place.

        Args:
            model: its names and its configuration stay.
            table: its parameters, with whole shapes.
            weights: initial values of what the method does not hold, taken if `fresh`.
            dtype: of trained parameters.
            frozen_dtype: of frozen ones.
            fresh: False when `load_state` follows.
        """
