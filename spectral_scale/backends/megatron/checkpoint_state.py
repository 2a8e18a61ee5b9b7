"""Checkpoints of a model under Megatron: this rank's parts as rectangles of logical tensors."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_scale.backends.base import Replicated
from spectral_scale.backends.megatron.optimizer import Masters
from spectral_scale.backends.megatron.partitioning import flat_place, sharded_dim_of
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk, range_chunks
from spectral_scale.parallel.shard_geometry import Rectangle
from spectral_scale.parallel.store import MOMENTS
from spectral_scale.parallel.table import ParameterTable
from spectral_scale.parallel.tensor_parallel_table import local_rectangle


class MegatronState:
    """Trained parameters and their moments, whatever the optimizer shards.

    Args:
        model: the tree of names; its parameters are this rank's parts.
        table: their whole shapes.
        masters: where moments are.
        tensor: the tensor-parallel group.
        data: the data-parallel group.
    """

    def __init__(
        self,
        model: nn.Module,
        table: ParameterTable,
        masters: Masters,
        tensor: dist.ProcessGroup,
        data: dist.ProcessGroup,
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self._table, self._masters = table, masters
        self._tensor, self._data = tensor, data

    def chunks(self) -> Iterator[TensorChunk]:
        """What this rank writes: every element of every tensor is written by one rank."""
        if self._data.rank() != 0 and not self._masters.sharded:
            return
        for fqn, parameter in self._trained():
            held = self._masters.held(parameter)
            if held is None or (sharded_dim_of(parameter) is None and self._tensor.rank() != 0):
                continue
            main, start, state = held
            yield from self._pieces(f"model/{fqn}", fqn, main.detach(), start)
            for key in MOMENTS:
                yield from self._pieces(f"optimizer/{fqn}/{key}", fqn, state[key], start)
            if start == 0 and self._tensor.rank() == 0:
                yield TensorChunk(f"optimizer/{fqn}/step", state["step"], (), ())

    @torch.no_grad()
    def load(self, read: ReadTensor) -> None:
        """Overwrite parameters and moments, in place."""
        for fqn, parameter in self._trained():
            box = self._box(fqn)
            parameter.copy_(read(f"model/{fqn}", offset=box.offset, shape=box.shape))
            held = self._masters.held(parameter)
            if held is None:
                continue
            main, start, state = held
            state["step"].copy_(read(f"optimizer/{fqn}/step"))
            for key in MOMENTS:
                for chunk in self._pieces(f"optimizer/{fqn}/{key}", fqn, state[key], start):
                    shape = tuple(chunk.tensor.shape)
                    chunk.tensor.copy_(read(chunk.name, offset=chunk.offset, shape=shape))

    def replicated(self) -> Iterator[Replicated]:
        """What copies hold, too: pieces of tensor-parallel rank t are called t, wholes 0."""
        for fqn, parameter in self._parameters.items():
            piece = 0 if sharded_dim_of(parameter) is None else self._tensor.rank()
            yield f"model/{fqn}", parameter.detach(), piece
            held = self._masters.held(parameter) if parameter.requires_grad else None
            if held is not None and not self._masters.sharded:
                for key, value in sorted(held[2].items()):
                    # A step count is no part of the tensor: every rank has the same.
                    yield f"optimizer/{fqn}/{key}", value, piece if value.ndim else 0

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for fqn, parameter in self._parameters.items():
            if parameter.requires_grad:
                yield fqn, parameter

    def _box(self, fqn: str) -> Rectangle:
        shape = self._table[fqn].global_shape
        return local_rectangle(fqn, shape, parts=self._tensor.size(), index=self._tensor.rank())

    def _pieces(self, name: str, fqn: str, held: Tensor, start: int) -> Iterator[TensorChunk]:
        """Elements [start, ...) of this rank's part, as views that are rectangles of the whole."""
        shape = self._table[fqn].global_shape
        order, first = flat_place(self._parameters[fqn], shape, self._tensor)
        return range_chunks(name, held.view(-1), first + start, order)
