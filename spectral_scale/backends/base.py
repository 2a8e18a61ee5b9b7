"""What the training loop sees of a backend, whatever the backend does with parameters.

`Backend` is the one interface. It has the optimizer step, written once: a backend fills in how
gradients are found, measured, scaled and applied.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_scale.backends import state
from spectral_scale.models.build import materialise
from spectral_scale.models.weights import InitialWeights, initialise_dense
from spectral_scale.optim.groups import kinds
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore, Replicated
from spectral_scale.parallel.table import ParameterTable

Judge = Callable[[Mapping[str, Tensor]], Tensor]
"""Decides from a step's gradient norms by group kind: 1 if the step must be left out, else 0;
float32, 0-dim, on the device, alike on all ranks."""
CLIP_EPSILON = 1e-6
"""What is added to a norm before dividing by it, as torch.nn.utils.clip_grads_with_norm_ does."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Outcome of one optimizer step."""

    applied: bool | None
    """False if it was left out, or skipped by the backend (an overflow); no counter may advance.
    None: the device decides, and has the answer in `left_out`."""
    grad_norms: Mapping[str, Tensor]
    """Norm of the averaged gradient before clipping, by group kind; 0-dim tensors."""
    loss_scale: float | None = None
    """What the step's loss was multiplied by, where fp16 needs it."""
    overflowed: bool = False
    """Whether the step was left out because gradients overflowed in fp16, so that norms are not
    finite. This is no fault of the run: the backend lowers the loss scale and goes on, and `judge`
    was not asked."""
    left_out: Tensor | None = None
    """1 if the device has left the step out, else 0, where no host has read it yet."""


class Backend(ABC):
    """Set up, make, attach, backward, step, state in and out, close, in that order.

    All methods are collective.
    """

    collective: Collective
    device: torch.device
    data_rank: int
    data_world_size: int
    data_collective: Collective
    """A group that holds one rank for each data rank: sums over it count every batch once."""

    # -- setting up ---------------------------------------------------------------------------

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
        """Give the (converted) meta model memory and values, in place, and `shard` it.

        By default every rank holds all of it. A backend that shards weights never holds more than
        its shards and one parameter; one with modules of its own puts its parameters under the
        names of the model.

        Args:
            model: its names and its configuration stay.
            table: its parameters, with whole shapes.
            weights: initial values of what the method does not hold. Frozen ones are always
                taken, trained ones only if `fresh`.
            dtype: of trained parameters.
            frozen_dtype: of frozen ones.
            fresh: False when `load_state` follows.
        """
        materialise(model, device=self.device, dtype=dtype)
        initialise_dense(model, table, weights, frozen_only=not fresh)
        self.shard(model)

    @abstractmethod
    def shard(self, model: nn.Module) -> None:
        """Take the model over, in place; before the optimizer is built."""

    def own_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """What to attach in place of `optimizer`, over the same groups; by default `optimizer`.

        Raises ConfigError if the configuration demands one that cannot be had.
        """
        return optimizer

    @abstractmethod
    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Take the optimizer over; the module that forward is called on."""

    @abstractmethod
    def store(self) -> ParameterStore:
        """Access to logical parameters for the method's controller and the gradient filter."""

    # -- a step -------------------------------------------------------------------------------

    @abstractmethod
    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch; gradients are reduced across ranks in the last one only."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss whose sum over ranks and micro-batches is the step's."""

    def step(self, *, clip_grad_norm: float, judge: Judge | None = None) -> StepStats:
        """Clip each group kind by its own norm, update, and clear the gradients.

        `judge` is asked after the norms are known and before anything changes. If the step must be
        left out, the gradients are dropped and weights, moments and step counts stay as they are,
        bit for bit. Where the optimizer can obey on the device, the host does not wait for the
        answer. `clip_grad_norm` 0 leaves gradients as they are.
        """
        loss_scale = self._loss_scale()
        gradients = self._gradients_by_kind()
        norms = self._norms_by_kind(gradients)
        if self._skip_overflow(norms):
            return StepStats(
                applied=False, grad_norms=norms, loss_scale=loss_scale, overflowed=True
            )
        left_out = None if judge is None else judge(norms)
        if left_out is not None and not self._obeys_on_device():
            refused, left_out = bool(left_out), None
            if refused:
                self._drop_gradients()
                return StepStats(applied=False, grad_norms=norms, loss_scale=loss_scale)
        if clip_grad_norm > 0:
            for kind, members in gradients.items():
                if members:  # this rank may hold none of a kind
                    factor = self._clip_factor(norms[kind], clip_grad_norm)
                    self._scale_gradients(members, factor)
        applied = self._update(left_out)
        return StepStats(
            applied=applied if left_out is None else None,
            grad_norms=norms,
            loss_scale=loss_scale,
            left_out=left_out,
        )

    def _obeys_on_device(self) -> bool:
        """Whether `_update` takes a flag; otherwise the host asks for it before the update."""
        return False

    @abstractmethod
    def _gradients_by_kind(self) -> Mapping[str, Sequence[Tensor]]:
        """This rank's reduced gradients by group kind, every kind on every rank."""

    @abstractmethod
    def _norms_by_kind(self, gradients: Mapping[str, Sequence[Tensor]]) -> Mapping[str, Tensor]:
        """Norm of each kind's averaged gradient over all ranks, alike on all ranks."""

    @abstractmethod
    def _update(self, left_out: Tensor | None) -> bool:
        """Step the optimizer and clear the gradients; whether it was applied.

        If `left_out` is given and 1, nothing but the gradients may change by a bit.
        """

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Clear the gradients and change nothing else."""

    def _loss_scale(self) -> float | None:
        """What the step's loss was multiplied by; None without fp16."""
        return None

    def _skip_overflow(self, norms: Mapping[str, Tensor]) -> bool:
        """Drop a step whose gradients overflowed in fp16, and lower the loss scale; whether it was
        one. Without fp16 there is none."""
        return False

    def _clip_factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """What gradients of this norm are multiplied by so that it is at most `max_norm`."""
        return (max_norm / (norm + CLIP_EPSILON)).clamp_max_(1.0)

    def _scale_gradients(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply gradients by a 0-dim factor, in place."""
        torch._foreach_mul_(list(gradients), factor)

    # -- state, and the end -------------------------------------------------------------------

    def state_chunks(self) -> Iterator[TensorChunk]:
        """What this rank writes to a checkpoint: `model/<fqn>` and `optimizer/<fqn>/<key>`."""
        return state.state_chunks(self.store())

    def replicated(self) -> Iterator[Replicated]:
        """What other ranks hold, too: shards of one name and index are equal, bit for bit."""
        return state.replicated(self.store())

    def load_state(self, read: ReadTensor) -> None:
        """Overwrite trained parameters and optimizer state, in place, from a checkpoint."""
        state.load_state(self.store(), read)

    @abstractmethod
    def close(self, *, failed: bool = False) -> None:
        """Leave the process group; collective unless this rank has failed."""


def gradients_of(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """The gradients that a torch optimizer will step with, by group kind."""
    return {
        kind: [p.grad for group in groups for p in group["params"] if p.grad is not None]
        for kind, groups in kinds(optimizer.param_groups).items()
    }
