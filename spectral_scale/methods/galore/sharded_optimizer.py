"""GaLore on hosts that cut or flatten parameters: every matrix has one owner among the ranks.

In a step the reduced gradient of a matrix comes together on its owner, which keeps the projector
and the moments and sends the update back to whoever keeps the weight. So no formula needs to know
how a host cuts, and state is divided over ranks. A matrix that one rank holds whole is that rank's,
and does not travel.
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
from spectral_scale.optim.build import adamw_state
from spectral_scale.parallel.chunks import ReadTensor, overwrite
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.flat_shards import ParameterShards
from spectral_scale.parallel.shard_geometry import Range
from spectral_scale.parallel.store import MOMENTS


class ShardedGaLoreAdamW(ProjectedAdamW):
    """GaLore whose matrices are cut over ranks, or lie in flat buffers.

    The host's optimizer state holds the step counts of projected parameters and all state of
    others; projectors and moments are the owners' (`state_tensors`). Call `bind` when the host has
    taken the parameters over. A host may step groups, and parts of them, one by one.

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
        self._pieces: ParameterShards
        self._owners: dict[str, int] = {}
        self._states: dict[str, dict[str, Tensor]] = {}
        self._rounds: dict[tuple[str, ...], list[ProjectionRound]] = {}

    def bind(self, pieces: ParameterShards) -> None:
        """Reach parameters through the host's pieces, and create the state of owned matrices.

        Raises ConfigError for matrices that are cut into columns.
        """
        self._pieces = pieces
        ranks = {
            fqn: group["galore_rank"]
            for group in filter(is_projected, self.param_groups)
            for fqn in group["fqns"]
        }
        shapes = {fqn: (pieces.shapes[fqn][0], pieces.shapes[fqn][1]) for fqn in ranks}
        _require_rows(pieces, ranks)
        holders = {fqn: _holders(pieces.ranges(fqn)) for fqn in ranks}
        at_one = {fqn: found[0] for fqn, found in holders.items() if len(found) == 1}
        self._owners = assign_owners(shapes, pieces.group.size, settled=at_one)
        self._states = {
            fqn: low_rank_state(shapes[fqn], ranks[fqn], like=pieces.value(fqn))
            for fqn, owner in self._owners.items()
            if owner == pieces.group.index
        }

    @property
    def matrices_here(self) -> int:
        """The matrices that this rank owns."""
        return len(self._states)

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """For hosts: a projected parameter has a step count, on the CPU, and no more."""
        if is_projected(group):
            return {"step": torch.zeros((), dtype=torch.float32)}
        return adamw_state(parameter)

    def kept_apart(self) -> Iterator[Tensor]:
        """Projectors and moments of owned matrices."""
        for state in self._states.values():
            yield from state.values()

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same by checkpoint name, from the copy of the model that is saved."""
        if self._pieces.group.writes:
            yield from self._named_state()

    def load_state_tensors(self, read: ReadTensor) -> None:
        """Overwrite them, in place. Raises CheckpointError for one of another shape."""
        overwrite(self._named_state(), read)

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        for fqn, state in self._states.items():
            for key, tensor in state.items():
                yield f"optimizer/{fqn}/{key}", tensor

    # -- a step -------------------------------------------------------------------------------

    def _step_projected(self, group: dict[str, Any]) -> None:
        pieces = self._pieces
        holders = {fqn: p for p in group["params"] for fqn in pieces.members(p)}
        fqns = tuple(holders)
        if fqns not in self._rounds:
            self._rounds[fqns] = plan_rounds(fqns, self._owners, pieces)
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
        """Gradients to the owners, updates back, and into the weights. Collective.

        `renewed` gets the overlaps of this rank's new projectors; None: they stay.
        """
        gradients = self._gather(round_, holders)
        if renewed is not None:
            renewed |= self._renew(round_, gradients, group["galore_rank"])
        changes = (
            (fqn, self._update(fqn, gradient, group, taken)) for fqn, gradient in gradients.items()
        )
        keep = 1.0 - group["lr"] * group["weight_decay"]
        self._deliver(round_, holders, changes, keep=keep)

    def _gather(self, round_: ProjectionRound, holders: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the matrices that this rank owns."""
        pieces = self._pieces
        parts = [
            pieces.local_view(fqn, gradient_of(holders[fqn]).contiguous()).to(pieces.device)
            for fqn in round_.fqns
        ]
        if round_.exchange is not None:
            parts = round_.exchange.forward(parts, dtype=parts[0].dtype)
        together = zip(round_.fqns, parts, strict=True)
        return {fqn: p.view(pieces.shapes[fqn]) for fqn, p in together if fqn in round_.mine}

    def _deliver(
        self,
        round_: ProjectionRound,
        holders: Mapping[str, Tensor],
        changes: Iterable[tuple[str, Tensor]],
        *,
        keep: float,
    ) -> None:
        """Decay weights to `keep` of what they are, and add what they change by."""
        pieces, exchange = self._pieces, round_.exchange
        updates: Iterable[tuple[str, Tensor]]
        updates = ((fqn, change.reshape(-1)) for fqn, change in changes)
        if exchange is not None:
            known, nothing = dict(updates), torch.empty(0, device=pieces.device)
            parts = [known.get(fqn, nothing) for fqn in round_.fqns]
            dtype = pieces.value(round_.fqns[0]).dtype
            back = exchange.backward(parts, dtype=dtype)
            updates = zip(round_.fqns, back, strict=True)
        for fqn, update in updates:
            value = pieces.local_view(fqn, holders[fqn])
            value.mul_(keep).add_(update.to(value.device))

    def _update(self, fqn: str, gradient: Tensor, group: dict[str, Any], taken: int) -> Tensor:
        """What the whole matrix changes by, decay apart; moments follow.

        Where state rests on the CPU, it visits the device of the gradient.
        """
        resting = self._states[fqn]
        state = {key: tensor.to(gradient.device) for key, tensor in resting.items()}
        count = {"step": torch.tensor(float(taken))}
        update, projector = low_rank_update(gradient, state | count, group), state["projector"]
        for key in MOMENTS:
            if state[key] is not resting[key]:
                resting[key].copy_(state[key])
        self.stats.projected += 1
        right = projects_right(gradient.shape)
        change = update @ projector.t() if right else projector @ update
        return change.mul_(group["scale"])

    def _renew(
        self, round_: ProjectionRound, gradients: Mapping[str, Tensor], rank: int
    ) -> dict[str, Tensor]:
        """One copy of the model decomposes a matrix and the others take the projector over, so that
        none can differ; the overlaps with those replaced. Collective."""
        copies, fresh, problem = self._pieces.group, {}, None
        try:
            for fqn, copy in round_.mine.items():
                if copy == copies.replica:
                    fresh[fqn] = leading_subspace(gradients[fqn], rank)
        except (ValueError, torch.linalg.LinAlgError) as error:
            problem = f"gradient of {fqn}: {error}"
        agreed = self._collective.agree(problem, what="GaLore projection")
        if agreed is not None:
            raise SpectralError(f"{agreed}; {ADVICE}")
        overlaps = {}
        for fqn, copy in round_.mine.items():
            resting = self._states[fqn]["projector"]
            old = resting.to(self._pieces.device)
            new = fresh[fqn] if fqn in fresh else torch.empty_like(old)
            copies.broadcast_from_replica(new, copy)
            overlaps[fqn] = subspace_overlap(old, new)
            resting.copy_(new)
        return overlaps

    def _count(self, fqns: Sequence[str], renewed: Mapping[str, Tensor], *, first: bool) -> None:
        """All owners' renewals and overlaps: one all-reduce of a number a matrix."""
        nothing = torch.zeros((), device=self._pieces.device)
        overlaps = [renewed.get(fqn, nothing).to(nothing) for fqn in fqns]
        *overlaps, count = self._pieces.group.sum(torch.stack([*overlaps, nothing + len(renewed)]))
        self.stats.renewed += int(count)
        self.stats.overlaps += [] if first else overlaps


def _require_rows(pieces: ParameterShards, fqns: Iterable[str]) -> None:
    """Owners put ranges of rows together."""
    for fqn in fqns:
        if pieces.order(fqn).column_blocks > 1:
            raise ConfigError(
                f"GaLore's owner of {fqn} needs ranges of its rows, but ranks hold columns; shard "
                "along rows, without tensor parallelism"
            )


def _holders(ranges: Sequence[Range]) -> list[int]:
    """The ranks that hold anything of a matrix."""
    return [rank for rank, (_, numel) in enumerate(ranges) if numel]
