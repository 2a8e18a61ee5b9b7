"""How a controller reaches parameters over tensor- and data-parallel ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from spectral_scale.backends.megatron.matrix import SpectralMatrix
from spectral_scale.backends.megatron.optimizer import Masters
from spectral_scale.backends.megatron.partitioning import sharded_dim_of
from spectral_scale.backends.megatron.shards import MegatronShards
from spectral_scale.errors import ConfigError
from spectral_scale.methods.owners import assign_owners
from spectral_scale.methods.sst.layer import spectral_layers
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.group import present_group
from spectral_scale.parallel.packing import broadcast_into, unpack
from spectral_scale.parallel.shard_geometry import Range
from spectral_scale.parallel.stacking import (
    alike,
    column_norms,
    divide_columns,
    keep_if,
    raise_to_zero,
)
from spectral_scale.parallel.store import MOMENTS, ParameterStore, Replicated
from spectral_scale.parallel.table import ParameterTable


class MegatronStore(ParameterStore):
    """Parameters of a model with Megatron's tensor parallelism, on one replica or several.

    An owner is one rank of all. A sharded parameter is gathered to it within its tensor-parallel
    group; on the way back each rank of that group broadcasts its shard to its data-parallel group.

    Args:
        model: not wrapped; its parameters carry Megatron's marks of how they are sharded.
        optimizer: a torch AdamW, or Megatron's around one; None: there are no moments to reset.
        collective: all ranks of the model; by default those of the default process group.
        table: the parameters' whole shapes; for `shards`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any | None,
        collective: Collective | None = None,
        table: ParameterTable | None = None,
    ) -> None:
        self.collective = collective or present_group()
        self._table = table
        self._shards: MegatronShards | None = None
        self._layers = spectral_layers(model)
        self._parameters = dict(model.named_parameters())
        self._sharded_dims = {fqn: sharded_dim_of(p) for fqn, p in self._parameters.items()}
        self._device = next(iter(self._parameters.values())).device
        self._masters = None if optimizer is None else Masters(optimizer)
        self._tensor = parallel_state.get_tensor_model_parallel_group()
        self._data = parallel_state.get_data_parallel_group()
        self._tensor_ranks, self._data_ranks = map(
            dist.get_process_group_ranks, (self._tensor, self._data)
        )
        if self._tensor.size() * self._data.size() != self.collective.world_size:
            raise ConfigError(
                f"{self._tensor.size()} tensor-parallel x {self._data.size()} data-parallel ranks "
                f"are not the {self.collective.world_size} of the run; pipeline, context and "
                "expert parallelism are not supported"
            )
        if self._tensor_ranks != self._group_of(self.collective.rank):
            raise ConfigError(
                f"tensor-parallel ranks {self._tensor_ranks} are not neighbours; call "
                "initialize_model_parallel with its default order"
            )

    def gather(self, fqn: str, *, owner: int) -> Tensor | None:
        """The whole value on the owner, from the ranks of its tensor-parallel group."""
        parameter, dim = self._parameters[fqn].detach(), self._sharded_dims[fqn]
        if dim is None:
            return parameter if self.collective.rank == owner else None
        return self._gather(parameter, dim, owner)

    @torch.no_grad()
    def scatter(self, values: Mapping[str, Tensor | None], *, owner: int) -> None:
        """Scatter to the owner's tensor-parallel group, then broadcast to the other replicas."""
        whole = {f: self._parameters[f].detach() for f in values if self._sharded_dims[f] is None}
        broadcast_into(whole, {fqn: values[fqn] for fqn in whole}, self.collective, owner=owner)
        packets: dict[torch.dtype, list[str]] = {}
        for fqn in values:
            if fqn not in whole and self._parameters[fqn].numel():
                packets.setdefault(self._parameters[fqn].dtype, []).append(fqn)
        for fqns in packets.values():
            self._send(fqns, values, owner)

    @torch.no_grad()
    def reset_moments(self, fqns: Sequence[str]) -> int:
        """Zero exp_avg, exp_avg_sq and step; the moments zeroed, each counted once over ranks."""
        zeroed = torch.zeros((), dtype=torch.int64, device=self._device)
        for fqn in fqns:
            parameter = self._parameters[fqn]
            found = self._masters.stepped(parameter) if self._masters else None
            if found is None:
                continue
            for name in MOMENTS:
                if name in found[2]:
                    found[2][name].zero_()
                    zeroed += found[2][name].numel() if self._counts(fqn) else 0
            if "step" in found[2]:
                found[2]["step"].zero_()
        return int(self.collective.all_reduce_sum(zeroed))

    @torch.no_grad()
    def retract_columns(self, fqns: Iterable[str], *, unless: Tensor | None = None) -> None:
        """Scale every column to unit length: one all-reduce of sharded factors' squared norms."""
        names = list(fqns)
        factors = [self._parameters[fqn] for fqn in names]
        by_rows = [self._sharded_dims[fqn] == 0 for fqn in names]
        groups = alike(factors, by_rows)
        squares = [norms.square_() for norms in column_norms(factors, groups)]
        # A rank that holds some rows of a column has a part of its norm only.
        cut = [s for group, s in zip(groups, squares, strict=True) if by_rows[group[0]]]
        if cut and self._tensor.size() > 1:
            total = torch.cat([square.flatten() for square in cut])
            dist.all_reduce(total, group=self._tensor)
            unpack(total, cut)
        divide_columns(factors, groups, keep_if(unless, [s.sqrt_() for s in squares]))

    @torch.no_grad()
    def clamp_nonnegative(self, fqns: Iterable[str]) -> None:
        """sigma = max(sigma, 0)."""
        raise_to_zero(self._parameters[fqn] for fqn in fqns)

    def shards(self) -> MegatronShards:
        """Flat shards of what the optimizer steps. Collective.

        Raises ConfigError unless the store was given an optimizer and a table.
        """
        if self._masters is None or self._table is None:
            raise ConfigError("a MegatronStore has shards only if it was given optimizer and table")
        if self._shards is None:
            self._shards = MegatronShards(
                self._parameters, self._table, self._masters, self._tensor, self._data
            )
        return self._shards

    def weight_range(self, fqn: str) -> Range:
        """This rank's local parameter, of which its optimizer may step a range only."""
        return self.shards().local_range(fqn)

    @torch.no_grad()
    def write(self, fqn: str, part: Tensor) -> None:
        """Overwrite the local parameter; what the optimizer steps are views of it."""
        self._parameters[fqn].view(-1).copy_(part)

    def replicated_weights(self) -> Iterator[Replicated]:
        """Every parameter: shards of tensor-parallel rank t have the index t, whole ones 0."""
        for fqn, parameter in self._parameters.items():
            index = 0 if self._sharded_dims[fqn] is None else self._tensor.rank()
            yield f"model/{fqn}", parameter.detach(), index

    def initial_weights(self) -> Callable[[str], Tensor]:
        """Dense weights of a converted model, each gathered to its owner, for the controller.

        Whole matrices, so that a decomposition never sees a shard. Collective. Raises ConfigError
        if a layer has none.
        """
        layers = {n: m for n, m in self._layers.items() if isinstance(m, SpectralMatrix)}
        shapes = {n: (m.out_features, m.in_features) for n, m in layers.items()}
        found: dict[str, Tensor | None] = {}
        for name, owner in assign_owners(shapes, self.collective.world_size).items():
            shard, layers[name].initial_shard = layers[name].initial_shard, None
            if shard is None:
                raise ConfigError(
                    f"{name} has no dense weight; it was not made by convert_gpt, or another "
                    "store has taken it already"
                )
            dim = 0 if layers[name].kind == "column" else 1
            found[name] = self._gather(shard, dim, owner)

        def weight(name: str) -> Tensor:
            value = found.pop(name)
            if value is None:
                raise ConfigError(f"{name} is asked for on a rank that does not own it")
            return value

        return weight

    def _counts(self, fqn: str) -> bool:
        """Whether this rank's moments of it are counted, and not those of another replica."""
        first_replica = self._data.rank() == 0 or (
            self._masters is not None and self._masters.sharded
        )
        return first_replica and (self._sharded_dims[fqn] is not None or self._tensor.rank() == 0)

    def _group_of(self, rank: int) -> list[int]:
        """The tensor-parallel group of any rank."""
        size = self._tensor.size()
        return [rank // size * size + i for i in range(size)]

    def _gather(self, shard: Tensor, dim: int, owner: int) -> Tensor | None:
        """Shards of the owner's tensor-parallel group, put together there; None elsewhere."""
        if self._tensor.size() == 1:
            return shard if self.collective.rank == owner else None
        if owner not in self._tensor_ranks:
            return None
        mine = shard.detach().contiguous()
        shards = None
        if self.collective.rank == owner:
            shards = [torch.empty_like(mine) for _ in range(self._tensor.size())]
        dist.gather(mine, shards, dst=owner, group=self._tensor)
        return None if shards is None else torch.cat(shards, dim=dim)

    def _send(self, fqns: Sequence[str], values: Mapping[str, Tensor | None], owner: int) -> None:
        """Overwrite sharded parameters of one dtype by the owner's whole values, in place."""
        # Ranks 0 1 | 2 3 are two tensor-parallel groups and owner is 2: it scatters to 2 and 3;
        # then 2 sends its shard to 0, and 3 to 1. Ranks 0 and 1 take part in the second half only.
        into = [self._parameters[fqn].detach() for fqn in fqns]
        shards = self._flat_shards(fqns, values) if self.collective.rank == owner else None
        flat = into[0].new_empty(sum(t.numel() for t in into)) if shards is None else shards[0]
        if self._tensor.size() > 1 and owner in self._tensor_ranks:
            flat = torch.empty_like(flat)
            dist.scatter(flat, shards, src=owner, group=self._tensor)
        if self._data.size() > 1:
            source = self._group_of(owner)[self._tensor.rank()]
            dist.broadcast(flat, src=source, group=self._data)
        unpack(flat, into)

    def _flat_shards(
        self, fqns: Sequence[str], values: Mapping[str, Tensor | None]
    ) -> list[Tensor]:
        """The owner's values in shards: one flat tensor for each tensor-parallel rank."""
        ranks: list[list[Tensor]] = [[] for _ in range(self._tensor.size())]
        for fqn in fqns:
            target, value, dim = self._parameters[fqn], values[fqn], self._sharded_dims[fqn]
            if value is None or dim is None:
                raise RuntimeError(f"the owner has no value of {fqn}")
            for rank, shard in zip(ranks, value.chunk(len(ranks), dim=dim), strict=True):
                rank.append(shard.to(target).reshape(-1))
        return [torch.cat(rank) for rank in ranks]
