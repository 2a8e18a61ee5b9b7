"""How a controller reaches parameters that `fully_shard` has made DTensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.dtensor_collectives import gather, local, scatter, sum_over_shards
from spectral_scale.parallel.dtensor_layout import DTensorLayout, DTensorLayouts
from spectral_scale.parallel.flat_shards import TensorShards
from spectral_scale.parallel.group import present_group
from spectral_scale.parallel.packing import broadcast_into
from spectral_scale.parallel.shard_geometry import Rectangle
from spectral_scale.parallel.stacking import (
    alike,
    column_norms,
    divide_columns,
    keep_if,
    raise_to_zero,
)
from spectral_scale.parallel.store import (
    ParameterStore,
    Replicated,
    rearrange,
    rearrange_moments,
    zero_moments,
)


class FSDP2Store(ParameterStore):
    """Parameters of a model under `fully_shard` (FSDP2 or HSDP).

    Parameters that were left out of it (`ignored_params`), whole on every rank, are served too.

    Args:
        model: after `fully_shard`.
        optimizer: a torch optimizer over its parameters; None: there are no moments to reset.
        collective: all ranks of the model; by default those of the default process group.
        mesh: all ranks as a mesh, if parameters lie on a part of it only (tensor parallelism).
    """

    moves_moments = True
    keeps_whole_numbers = True  # `fully_shard` gathers int8 as it is, whatever its mixed precision

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        collective: Collective | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self._fsdp_modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._reshard()
        self._parameters = dict(model.named_parameters())
        self._optimizer = optimizer
        self.collective = collective or present_group()
        self.mesh = mesh
        self._shards: TensorShards | None = None
        self._layouts = DTensorLayouts(mesh)

    def gather(self, fqn: str, *, owner: int) -> Tensor | None:
        """The shards, put together on the owner."""
        self._reshard()
        parameter = self._parameters[fqn]
        if isinstance(parameter, DTensor):
            return gather(parameter, self._layouts.of(parameter), owner=owner)
        return parameter.detach() if self.collective.rank == owner else None

    @torch.no_grad()
    def scatter(self, values: Mapping[str, Tensor | None], *, owner: int) -> None:
        """Scatter from the owner, or broadcast what ranks hold whole: all parameters of a dtype and
        a placement in one message."""
        self._reshard()
        packets: dict[tuple[int, torch.dtype], dict[str, DTensor]] = {}
        kept_whole: dict[str, Tensor] = {}
        for fqn in values:
            parameter = self._parameters[fqn]
            if isinstance(parameter, DTensor):
                kind = (id(self._layouts.of(parameter)), parameter.dtype)
                packets.setdefault(kind, {})[fqn] = parameter
            else:
                kept_whole[fqn] = parameter.detach()
        broadcast_into(kept_whole, values, self.collective, owner=owner)
        for packet in packets.values():
            into = list(packet.values())
            whole = [values[fqn] for fqn in packet]
            scatter(whole, into, self._layouts.of(into[0]), owner=owner)

    @torch.no_grad()
    def reset_moments(self, fqns: Sequence[str]) -> int:
        """Zero the moments and step of each parameter that has them."""
        parameters = (self._parameters[fqn] for fqn in fqns)
        return zero_moments(self._optimizer, parameters, local) if self._optimizer else 0

    @torch.no_grad()
    def move_moments(self, fqn: str, source: Tensor) -> int:
        """Rearrange exp_avg and exp_avg_sq along the last axis, gathering them if it is sharded."""
        if self._optimizer is None:
            return 0
        parameter = self._parameters[fqn]
        return rearrange_moments(self._optimizer, parameter, source, self._rearrange, local)

    @torch.no_grad()
    def retract_columns(self, fqns: Iterable[str], *, unless: Tensor | None = None) -> None:
        """Scale every column to unit length: one all-reduce of r squared norms a factor.

        Norms are summed over ranks only where rows are spread over ranks.
        """
        self._reshard()
        factors = [self._parameters[fqn] for fqn in fqns]
        # u of 6 x 4 over 2 ranks: each holds 3 rows and sums their squares; 4 numbers are added
        # over ranks. Were columns spread instead, each rank would hold whole ones: nothing to add.
        # Factors of one shape and layout become one stack, so launches do not grow with layers.
        shards, by_rows = [local(f) for f in factors], [self._row_layout(f) for f in factors]
        kinds = [(f.shape, id(layout)) for f, layout in zip(factors, by_rows, strict=True)]
        groups = alike(shards, kinds)
        squares = [norms.square_() for norms in column_norms(shards, groups)]
        sums = sum_over_shards(squares, [by_rows[group[0]] for group in groups])
        divide_columns(shards, groups, keep_if(unless, [square.sqrt() for square in sums]))

    @torch.no_grad()
    def clamp_nonnegative(self, fqns: Iterable[str]) -> None:
        """sigma = max(sigma, 0)."""
        self._reshard()
        raise_to_zero(local(self._parameters[fqn]) for fqn in fqns)

    def shards(self) -> TensorShards:
        """The DTensors' local shards."""
        if self._shards is None:
            trained = {fqn: p for fqn, p in self._parameters.items() if p.requires_grad}
            self._shards = TensorShards(trained, self.mesh, self._optimizer)
        return self._shards

    @torch.no_grad()
    def write(self, fqn: str, part: Tensor) -> None:
        """Overwrite the local shard."""
        shard = local(self._parameters[fqn])
        shard.copy_(part.view(shard.shape))

    def replicated_weights(self) -> Iterator[Replicated]:
        """What `fully_shard` left whole and, under HSDP, the shards of the other replicas."""
        for fqn, parameter in self._parameters.items():
            if not isinstance(parameter, DTensor):
                yield f"model/{fqn}", parameter.detach(), 0
            elif len((layout := self._layouts.of(parameter)).replica_ranks) > 1:
                yield f"model/{fqn}", local(parameter), layout.shard_index

    def _reshard(self) -> None:
        """Free gathered copies: after a forward without a backward the root's parameters are still
        whole, and what is written to the shards would not be seen."""
        for module in self._fsdp_modules:
            module.reshard()

    def _rearrange(self, moment: Tensor, source: Tensor, new: Tensor) -> None:
        """Column j becomes column `source[j]`, or zero where `new`."""
        layout = self._layouts.of(moment) if isinstance(moment, DTensor) else None
        mine, shape = local(moment), tuple(moment.shape)
        if layout is None or layout.dim != len(shape) - 1:
            rearrange(mine, source, new)
            return
        # Columns are spread over ranks, so a column's new place may be on another rank.
        whole = cast(DTensor, moment).full_tensor().index_select(-1, source).masked_fill_(new, 0.0)
        box = layout.rectangle(shape)
        mine.copy_(whole[box.slices_in(Rectangle((0,) * len(shape), shape))])

    def _row_layout(self, parameter: Tensor) -> DTensorLayout | None:
        """The layout if rows (dimension 0) are sharded; None if columns are whole here."""
        layout = self._layouts.of(parameter) if isinstance(parameter, DTensor) else None
        return layout if layout is not None and layout.dim == 0 else None
