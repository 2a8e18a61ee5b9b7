"""GaLore on backends that shard or flatten parameters: every matrix has one owner among the ranks.

In a step the owner gathers the reduced gradient of its matrix, keeps projector and moments, and
scatters the update to the ranks that hold the weight. Formulas therefore see whole matrices,
whatever the sharding, and the low-rank state is sharded by matrix.

An example: two ranks, matrix A (4, 3) with rows 0-1 on rank 0 and rows 2-3 on rank 1, owner 0, and
matrix B (2, 2) that lies whole in rank 1's flat buffer, owner 1 because it is there already.

    gather     rank 1 sends 6 entries, A's rows 2-3 of the gradient; B does not travel
    update     rank 0: A's update (4, 3) = projected AdamW; rank 1: B's update (2, 2)
    scatter    rank 0 returns the 6 entries of A's update that belong to rows 2-3
    apply      each rank: weight = keep * weight + its entries of the update

Invariant: the update of a matrix is made once, from the whole gradient, with the arithmetic of
`GaLoreAdamW`, so a run's bits depend neither on the sharding nor on which rank owns the matrix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.galore.optimizer import (
    ADVICE,
    ProjectedAdamW,
    gradient_of,
    is_projected,
)
from spectral_scale.methods.galore.projection import (
    leading_subspace,
    low_rank_state,
    low_rank_update,
    projects_right,
    subspace_overlap,
)
from spectral_scale.methods.galore.rounds import ProjectionRound, plan_rounds
from spectral_scale.methods.owners import assign_owners
from spectral_scale.ops.precision import exact_products
from spectral_scale.optim.build import adamw_state
from spectral_scale.parallel.chunks import ReadTensor, overwrite
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.flat_shards import ParameterShards
from spectral_scale.parallel.shard_geometry import Range
from spectral_scale.parallel.store import MOMENTS


class ShardedGaLoreAdamW(ProjectedAdamW):
    """GaLore whose matrices are sharded over ranks, or lie in flat buffers.

    The backend's optimizer state holds the step counts of projected parameters and all state of
    others; projectors and moments are the owners' (`state_tensors`). Call `bind` when the backend
    has taken the parameters over. A backend may step groups, and subsets of them, one by one.

    Args:
        params: groups, see `ProjectedAdamW`, with the `fqns` of their parameters.
        collective: all ranks of the run.
        adamw: `lr`, `betas`, `eps`, `weight_decay` of the groups that hold none.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, collective: Collective, **adamw: Any
    ) -> None:
        super().__init__(params, **adamw)
        self._collective = collective
        self._shards: ParameterShards
        self._owners: dict[str, int] = {}
        self._states: dict[str, dict[str, Tensor]] = {}
        self._rounds: dict[tuple[str, ...], list[ProjectionRound]] = {}

    def bind(self, shards: ParameterShards) -> None:
        """Reach parameters through the backend's shards, and create the state of owned matrices.

        Raises ConfigError for matrices that are sharded by columns.
        """
        self._shards = shards
        ranks = {
            fqn: group["galore_rank"]
            for group in filter(is_projected, self.param_groups)
            for fqn in group["fqns"]
        }
        shapes = {fqn: (shards.shapes[fqn][0], shards.shapes[fqn][1]) for fqn in ranks}
        _require_rows(shards, ranks)
        holders = {fqn: _holders(shards.ranges(fqn)) for fqn in ranks}
        at_one = {fqn: found[0] for fqn, found in holders.items() if len(found) == 1}
        self._owners = assign_owners(shapes, shards.group.size, fixed=at_one)
        self._states = {
            fqn: low_rank_state(shapes[fqn], ranks[fqn], like=shards.value(fqn))
            for fqn, owner in self._owners.items()
            if owner == shards.group.index
        }

    @property
    def matrices_here(self) -> int:
        """The number of matrices that this rank owns."""
        return len(self._states)

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state that a backend keeps for a parameter: of a projected one a step count alone.

        The count lies on the CPU, where it is read in every step.
        """
        if is_projected(group):
            return {"step": torch.zeros((), dtype=torch.float32)}
        return adamw_state(parameter)

    def kept_apart(self) -> Iterator[Tensor]:
        """Projectors and moments of owned matrices."""
        for state in self._states.values():
            yield from state.values()

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Projectors and moments of owned matrices by checkpoint name, from the saved replica."""
        if self._shards.group.writes:
            yield from self._named_state()

    def load_state_tensors(self, read: ReadTensor) -> None:
        """Overwrite projectors and moments, in place. Raises CheckpointError for another shape."""
        overwrite(self._named_state(), read)

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        for fqn, state in self._states.items():
            for key, tensor in state.items():
                yield f"optimizer/{fqn}/{key}", tensor

    # -- a step -------------------------------------------------------------------------------

    def _step_projected(self, group: dict[str, Any]) -> None:
        shards = self._shards
        holders = {fqn: p for p in group["params"] for fqn in shards.members(p)}
        fqns = tuple(holders)
        if fqns not in self._rounds:
            self._rounds[fqns] = plan_rounds(fqns, self._owners, shards)
        steps = [self.state[parameter]["step"] for parameter in group["params"]]
        taken = int(steps[0])
        renewed: dict[str, Tensor] | None = None
        if taken % group["update_interval"] == 0:
            renewed = {}
        for round_ in self._rounds[fqns]:
            self._run(round_, holders, group, taken, renewed)
        for step in steps:
            step.fill_(taken + 1)
        if renewed is not None:
            self._count(fqns, renewed, first=taken == 0)

    def _run(
        self,
        round_: ProjectionRound,
        holders: Mapping[str, Tensor],
        group: dict[str, Any],
        taken: int,
        renewed: dict[str, Tensor] | None,
    ) -> None:
        """Gather gradients on owners, scatter the updates, and apply them. Collective.

        The projectors are renewed unless `renewed` is None; it then receives the overlaps of this
        rank's new projectors with the old ones.
        """
        gradients = self._gather(round_, holders)
        if renewed is not None:
            renewed |= self._renew(round_, gradients, group["galore_rank"])
        changes = (
            (fqn, self._update(fqn, gradient, group, taken)) for fqn, gradient in gradients.items()
        )
        keep = 1.0 - group["lr"] * group["weight_decay"]
        self._scatter(round_, holders, changes, keep=keep)

    def _gather(self, round_: ProjectionRound, holders: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole gradients of the matrices that this rank owns, gathered from all ranks."""
        shards = self._shards
        flat = [
            shards.local_view(fqn, gradient_of(holders[fqn]).contiguous()).to(shards.device)
            for fqn in round_.fqns
        ]
        if round_.exchange is not None:
            flat = round_.exchange.forward(flat, dtype=flat[0].dtype)
        gathered = zip(round_.fqns, flat, strict=True)
        return {fqn: g.view(shards.shapes[fqn]) for fqn, g in gathered if fqn in round_.mine}

    def _scatter(
        self,
        round_: ProjectionRound,
        holders: Mapping[str, Tensor],
        changes: Iterable[tuple[str, Tensor]],
        *,
        keep: float,
    ) -> None:
        """Scatter the updates, decay weights by the factor `keep`, and add this rank's entries."""
        shards, exchange = self._shards, round_.exchange
        updates: Iterable[tuple[str, Tensor]]
        updates = ((fqn, change.reshape(-1)) for fqn, change in changes)
        if exchange is not None:
            known, nothing = dict(updates), torch.empty(0, device=shards.device)
            flat = [known.get(fqn, nothing) for fqn in round_.fqns]
            dtype = shards.value(round_.fqns[0]).dtype
            back = exchange.backward(flat, dtype=dtype)
            updates = zip(round_.fqns, back, strict=True)
        for fqn, update in updates:
            value = shards.local_view(fqn, holders[fqn])
            value.mul_(keep).add_(update.to(value.device))

    def _update(self, fqn: str, gradient: Tensor, group: dict[str, Any], taken: int) -> Tensor:
        """The update of the whole matrix without weight decay; its moments are updated in place.

        State that is offloaded to the CPU is copied to the gradient's device and back.
        """
        kept = self._states[fqn]
        state = {key: tensor.to(gradient.device) for key, tensor in kept.items()}
        count = {"step": torch.tensor(float(taken))}
        update, projector = low_rank_update(gradient, state | count, group), state["projector"]
        for key in MOMENTS:
            if state[key] is not kept[key]:
                kept[key].copy_(state[key])
        self.stats.projected += 1
        right = projects_right(gradient.shape)
        with exact_products():
            change = update @ projector.t() if right else projector @ update
        return change.mul_(group["scale"])

    def _renew(
        self, round_: ProjectionRound, gradients: Mapping[str, Tensor], rank: int
    ) -> dict[str, Tensor]:
        """New projectors of owned matrices; returns their overlaps with the old ones. Collective.

        One replica of the model decomposes a matrix and broadcasts the projector to the owner's
        counterparts in the other replicas, so that no two replicas can differ by a bit.
        """
        group, fresh, problem = self._shards.group, {}, None
        try:
            for fqn, replica in round_.mine.items():
                if replica == group.replica:
                    fresh[fqn] = leading_subspace(gradients[fqn], rank)
        except (ValueError, torch.linalg.LinAlgError) as error:
            problem = f"gradient of {fqn}: {error}"
        agreed = self._collective.agree(problem, what="GaLore projection")
        if agreed is not None:
            raise SpectralError(f"{agreed}; {ADVICE}")
        overlaps = {}
        for fqn, replica in round_.mine.items():
            kept = self._states[fqn]["projector"]
            old = kept.to(self._shards.device)
            new = fresh[fqn] if fqn in fresh else torch.empty_like(old)
            group.broadcast_from_replica(new, replica)
            overlaps[fqn] = subspace_overlap(old, new)
            kept.copy_(new)
        return overlaps

    def _count(self, fqns: Sequence[str], renewed: Mapping[str, Tensor], *, first: bool) -> None:
        """Add all owners' renewals and overlaps to `stats`: one all-reduce, a number a matrix."""
        nothing = torch.zeros((), device=self._shards.device)
        overlaps = [renewed.get(fqn, nothing).to(nothing) for fqn in fqns]
        *overlaps, count = self._shards.group.sum(torch.stack([*overlaps, nothing + len(renewed)]))
        self.stats.renewed += int(count)
        self.stats.overlaps += [] if first else overlaps


def _require_rows(shards: ParameterShards, fqns: Iterable[str]) -> None:
    """Raise ConfigError for a matrix whose shards are not ranges of rows."""
    for fqn in fqns:
        if shards.order(fqn).column_blocks > 1:
            raise ConfigError(
                f"GaLore's owner of {fqn} needs ranges of its rows, but ranks hold columns; shard "
                "along rows, without tensor parallelism"
            )


def _holders(ranges: Sequence[Range]) -> list[int]:
    """The ranks that hold a non-empty shard of a matrix."""
    return [rank for rank, (_, numel) in enumerate(ranges) if numel]
