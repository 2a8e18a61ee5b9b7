"""How a controller reaches the logical parameters of a model that DeepSpeed trains.

A trained parameter exists twice, and both are always written: the module's weight, or the next
forward pass would use the old one, and the master, or the next step would bring the old one back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_scale.backends.deepspeed.optimizer_state import (
    create_state,
    register_step_hooks,
    set_step,
)
from spectral_scale.backends.deepspeed.partitions import Fragment, Layout, layout_of
from spectral_scale.backends.deepspeed.retraction import Directions
from spectral_scale.backends.deepspeed.shards import ZeroShards
from spectral_scale.errors import SpectralError
from spectral_scale.parallel.collective import Collective, ProcessGroup, SingleProcess
from spectral_scale.parallel.packing import broadcast_into, by_dtype, unpack
from spectral_scale.parallel.shard_geometry import Range
from spectral_scale.parallel.stacking import raise_to_zero
from spectral_scale.parallel.store import MOMENTS, ParameterStore, Replicated
from spectral_scale.parallel.table import parameter_table


class ZeroStore(ParameterStore):
    """Parameters of a `deepspeed.initialize`d engine: ZeRO-0 (fp32), 1, 2, 3, BF16_Optimizer.

    Creating it gives the optimizer its state. `register_step_hooks` makes every optimizer step
    retract the directions itself (see `Directions`); whoever owns the loop calls it once.

    Args:
        engine: what `deepspeed.initialize` returned for a converted model.
        collective: all ranks that train it; by default the default process group.

    Collective: all ranks construct it and call its methods alike. Raises ConfigError for an
    optimizer of DeepSpeed's whose parameters cannot be reached.
    """

    retracts_in_step = True

    def __init__(self, engine: Any, collective: Collective | None = None) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.collective = collective or (
            ProcessGroup(engine.device) if several else SingleProcess()
        )
        self.layout: Layout = layout_of(engine.optimizer)
        self.inner: torch.optim.Optimizer = (
            engine.optimizer if self.layout.replicated else engine.optimizer.optimizer
        )
        self.device = engine.device
        self.parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        create_state(self.inner, self.layout)
        self._shards = ZeroShards(
            self.layout, self.inner, self.parameters, self.collective, self.device
        )
        self.names, self.fragments = self._shards.names, self._shards.fragments
        self._frozen_ranges = self._exchange_frozen_ranges()
        roles = parameter_table(engine.module)
        directions = [fqn for fqn in self.fragments if roles[fqn].role == "direction"]
        self._directions = Directions(self.layout, self._shards, directions, self.collective)

    def register_step_hooks(self) -> None:
        """Let every optimizer step retract the directions, and DeepSpeedCPUAdam forget its powers.

        Call it once, before the first step.
        """
        register_step_hooks(self.inner)
        self.inner.register_step_post_hook(self._directions.after_step)

    # -- ParameterStore ---------------------------------------------------------------------

    @torch.no_grad()
    def gather(self, fqn: str, *, owner: int) -> Tensor | None:
        """The master, or a frozen weight, on the owner; each element is sent once, by a rank that
        keeps it."""
        parameter, rank = self.parameters[fqn], self.collective.rank
        if self._every_rank_has_it(parameter):
            return parameter.detach() if rank == owner else None
        mine, ranges = self._local_part(fqn), self._ranges(fqn)
        if rank != owner:
            if mine is not None:
                _exchange([dist.P2POp(dist.isend, mine, owner)])
            return None
        dtype = torch.float32 if parameter.requires_grad else parameter.dtype
        flat = torch.zeros(sum(n for _, n in ranges), dtype=dtype, device=self.device)
        parts = {r: flat[s : s + n] for r, (s, n) in enumerate(ranges) if n}
        if mine is not None:
            parts.pop(owner).copy_(mine)
        _exchange([dist.P2POp(dist.irecv, part, source) for source, part in parts.items()])
        return flat.view(self.layout.shape(parameter))

    @torch.no_grad()
    def scatter(self, values: Mapping[str, Tensor | None], *, owner: int) -> None:
        """Trained parameters travel in fp32, frozen ones in the module's precision: one broadcast
        for all of a precision or, where weights are sharded, one message to each rank."""
        flat: dict[str, Tensor | None] = {}
        for fqn, value in values.items():
            if 0 not in self.layout.shape(self.parameters[fqn]):
                flat[fqn] = None if value is None else value.detach().reshape(-1)
        if self.layout.shards_weights:
            for fqn, part in self._scatter(flat, owner).items():
                self.write(fqn, part)
            return
        into = {fqn: self._receive_buffer(fqn) for fqn in flat}
        broadcast_into(into, flat, self.collective, owner=owner)
        for fqn in (f for f in into if self.parameters[f].requires_grad):
            self.write(fqn, into[fqn])

    @torch.no_grad()
    def reset_moments(self, fqns: Sequence[str]) -> int:
        """Zero the moments of the masters and the steps they share.

        Raises SpectralError if parameters that are not in `fqns` share those steps.
        """
        chosen = set(fqns)
        for flat in self.layout.flats():
            inside = {self.names[id(parameter)] for parameter in flat.members}
            if not inside & chosen:
                continue
            if left_out := sorted(inside - chosen):
                raise SpectralError(
                    f"{left_out[0]} shares an optimizer group, and so Adam's step, with parameters "
                    "whose moments are reset; build the groups with spectral_scale.param_groups"
                )
            set_step(self.inner, flat.tensor, 0.0)
        zeroed = 0
        for fragment in filter(None, (self.fragments[fqn] for fqn in fqns)):
            for key in MOMENTS:
                moments = fragment.of(self.inner.state[fragment.flat][key])
                zeroed += moments.zero_().numel()
        if self.layout.replicated:
            return zeroed
        return int(self.collective.all_reduce_sum(torch.tensor(zeroed, device=self.device)))

    def retract_columns(self, fqns: Iterable[str], *, unless: Tensor | None = None) -> None:
        """Raise SpectralError: the step retracts, and nothing is left to do after it."""
        raise SpectralError(
            "behind DeepSpeed each optimizer step retracts directions itself; call "
            "require_retracted() after it"
        )

    def require_retracted(self, fqns: Iterable[str]) -> None:
        """Raise SpectralError unless the last optimizer step retracted all columns of `fqns`."""
        self._directions.require(fqns)

    @torch.no_grad()
    def clamp_nonnegative(self, fqns: Iterable[str]) -> None:
        """Rounding keeps the sign, so both copies are clamped where they are."""
        names = list(fqns)
        masters = [f.master for fqn in names if (f := self.fragments[fqn]) is not None]
        weights = [w for fqn in names for w in self.layout.weight_copies(self.parameters[fqn])]
        for group in by_dtype([*masters, *weights]):
            raise_to_zero(group)

    # -- shards and state -------------------------------------------------------------------

    def shards(self) -> ZeroShards:
        """Fragments of the masters."""
        return self._shards

    def weight_range(self, fqn: str) -> Range:
        """The range of the module's weight on this rank: all of it below ZeRO-3."""
        return self.layout.weight_range(self.parameters[fqn])

    @torch.no_grad()
    def write(self, fqn: str, part: Tensor) -> None:
        """Overwrite the master's fragment and the module's weight. Collective."""
        parameter, fragment = self.parameters[fqn], self.fragments.get(fqn)
        part = part.to(self.device)
        if fragment is not None:
            offset = fragment.start - self.layout.weight_range(parameter)[0]
            self.write_master(fragment, part.narrow(0, offset, fragment.numel))
        self.write_weight(parameter, part)

    def replicated_weights(self) -> Iterator[Replicated]:
        """The module's weights below ZeRO-3."""
        if not self.layout.shards_weights:
            for fqn, parameter in self.parameters.items():
                yield f"model/{fqn}", parameter.detach(), 0

    def write_master(self, fragment: Fragment, part: Tensor) -> None:
        """Overwrite what the optimizer trains."""
        fragment.master.copy_(part)

    def write_weight(self, parameter: nn.Parameter, part: Tensor) -> None:
        """Overwrite what the module computes with. Collective."""
        self.layout.write_weight(parameter, part)

    # -- small parts ------------------------------------------------------------------------

    def _every_rank_has_it(self, parameter: nn.Parameter) -> bool:
        """Whole weights are the value if they are frozen, and, in full precision, equal the masters
        that they were copied from."""
        exact = not parameter.requires_grad or parameter.dtype == torch.float32
        return self.layout.replicated or (exact and not self.layout.shards_weights)

    def _local_part(self, fqn: str) -> Tensor | None:
        """What this rank keeps of a value, 1-D, if anything."""
        parameter = self.parameters[fqn]
        if parameter.requires_grad:
            fragment = self.fragments[fqn]
            return None if fragment is None else fragment.master.to(self.device)
        weight = self.layout.weight(parameter)
        return weight.to(self.device) if weight.numel() else None

    def _ranges(self, fqn: str) -> list[Range]:
        """What each rank keeps of a value."""
        frozen = self._frozen_ranges.get(fqn)
        return self._shards.ranges(fqn) if frozen is None else frozen

    def _exchange_frozen_ranges(self) -> dict[str, list[Range]]:
        """Frozen parameter -> the range of its weight on each rank."""
        mine = {
            fqn: self.layout.weight_range(parameter)
            for fqn, parameter in self.parameters.items()
            if not parameter.requires_grad
        }
        ranks = self.collective.broadcast_json(self.collective.gather_json(mine))
        return {fqn: [tuple(rank[fqn]) for rank in ranks] for fqn in mine}

    def _receive_buffer(self, fqn: str) -> Tensor:
        """Where a whole value arrives, 1-D: a frozen weight itself, so that it never exists twice,
        or a temporary tensor from which a trained parameter's master and weight are written."""
        parameter = self.parameters[fqn]
        if parameter.requires_grad:
            return torch.empty(parameter.numel(), dtype=torch.float32, device=self.device)
        return parameter.detach().view(-1)

    def _scatter(self, values: Mapping[str, Tensor | None], owner: int) -> dict[str, Tensor]:
        """This rank's `weight_range` of each of the owner's 1-D values; one message a rank and
        precision."""
        rank, world = self.collective.rank, self.collective.world_size
        parts = {fqn: self._empty_shard(fqn) for fqn in values}
        for dtype in dict.fromkeys(part.dtype for part in parts.values()):
            chosen = [fqn for fqn, part in parts.items() if part.dtype == dtype]
            mine = torch.cat([parts[fqn] for fqn in chosen])
            if rank != owner:
                _exchange([dist.P2POp(dist.irecv, mine, owner)] if mine.numel() else [])
            else:
                packed = [self._packed(values, chosen, r, dtype) for r in range(world)]
                mine = packed[rank]
                others = [(r, p) for r, p in enumerate(packed) if r != rank and p.numel()]
                _exchange([dist.P2POp(dist.isend, p, r) for r, p in others])
            unpack(mine, [parts[fqn] for fqn in chosen])
        return parts

    def _packed(
        self, values: Mapping[str, Tensor | None], fqns: list[str], rank: int, dtype: torch.dtype
    ) -> Tensor:
        """What another rank holds of the values, one after another."""
        parts = []
        for fqn in fqns:
            value = values[fqn]
            if value is None:
                raise ValueError(f"the owner gave no value for {fqn}")
            partition = cast(Any, self.parameters[fqn]).partition_numel()
            parts.append(value[rank * partition : (rank + 1) * partition].to(self.device, dtype))
        return torch.cat(parts)

    def _empty_shard(self, fqn: str) -> Tensor:
        parameter = self.parameters[fqn]
        dtype = torch.float32 if parameter.requires_grad else parameter.dtype
        _, numel = self.layout.weight_range(parameter)
        return torch.empty(numel, dtype=dtype, device=self.device)


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
