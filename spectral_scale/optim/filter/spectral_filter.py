"""The filter as a step between the last backward pass and clipping, on any backend's shards.

Graph-spectral coordination of parameters (Zhang et al., arXiv 2504.19583), with the formulas that
the abstract leaves open filled in by us: see docs/spectral_filter.md.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.optim.filter.anchors import Anchors
from spectral_scale.optim.filter.block_set import BlockSet
from spectral_scale.optim.filter.gains import GainFilter
from spectral_scale.optim.filter.measure import Sums, measured, metrics
from spectral_scale.optim.filter.nodes import Member, plan_groups
from spectral_scale.optim.filter.operator import num_frequencies
from spectral_scale.optim.filter.sampling import Drift
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk, whole
from spectral_scale.parallel.flat_shards import ParameterShards

logger = logging.getLogger(__name__)


class SpectralFilter:
    """Filters gradients in place; the order of a step is filter, clip, AdamW.

    Call `apply` between the last backward pass and clipping, and `commit` once the optimizer step
    was applied (not if it was skipped). All ranks must call every method.

    Args:
        shards: the backend's gradients and values.
        roles: role of each trained parameter by fqn (see `parallel.table.Role`).
        config: the configuration, with `kind` or `joint_loss_mu` set.
        seed: fixes sampled entries and permutations.
        head_size: rows of an attention head; for `heads`.

    Raises ConfigError if nothing can be filtered as configured.
    """

    def __init__(
        self,
        shards: ParameterShards,
        roles: Mapping[str, str],
        config: FilterConfig,
        *,
        seed: int = 0,
        head_size: int | None = None,
    ) -> None:
        check_keys(config)
        self._shards, self.config = shards, config
        members = {fqn: Member(shape, roles[fqn]) for fqn, shape in shards.shapes.items()}
        self._groups = plan_groups(members, config, head_size=head_size)
        self.fqns = [fqn for group in self._groups for fqn in group.fqns]
        self._swapped = [fqn for fqn in self.fqns if roles[fqn] == "value"]
        self.steps = 0
        self._metrics: dict[str, Any] = {}
        self._gains: GainFilter | None = None
        self._blocks: BlockSet | None = None
        if config.nodes == "block_gains":
            self._gains = GainFilter(self._groups[0], config, shards, seed=seed)
        else:
            self._blocks = BlockSet(self._groups, config, shards, seed=seed)
        self._drift = Drift(shards, self.fqns, seed=seed)
        self._anchors = Anchors(shards, self.fqns) if config.joint_loss_mu else None
        logger.info("%s", self.describe())

    @torch.no_grad()
    def apply(self, *, measure: bool = False) -> None:
        """Filter all gradients in place, and add that of the joint loss.

        Args:
            measure: fill `metrics`; costs two more small products and one all-reduce of a few
                numbers a group.

        Raises SpectralError if a parameter has no gradient.
        """
        gradients = {fqn: self._gradient(fqn) for fqn in self.fqns}
        sums = self._new_sums() if measure or self.config.norm_matched else None
        if self._gains is not None:
            self._gains.run(gradients, None if sums is None else sums[0])
        if self._blocks is not None:
            self._blocks.run(
                gradients, self._anchors, sums, full=measure, needs_graph=self.steps > 0
            )
        if sums is not None:
            self._finish(gradients, sums, measure=measure)

    def _gradient(self, fqn: str) -> Tensor:
        found = self._shards.gradient(fqn)
        if found is None:
            raise SpectralError(
                f"{fqn} has no gradient, but its filter needs that of all its nodes; call the "
                "filter after the last backward pass, and leave what does not train out by "
                "filter.targets"
            )
        return found

    def _finish(
        self, gradients: Mapping[str, Tensor], sums: Sequence[Sums], *, measure: bool
    ) -> None:
        if measure:
            for group, of_group in zip(self._groups, sums, strict=True):
                for fqn in group.fqns:
                    self._drift.add(fqn, of_group)
        self._sum_over_ranks(sums)
        if self.config.norm_matched:
            self._match_norms(gradients, sums)
        if measure:
            found = [measured(g.kind, s.flat) for g, s in zip(self._groups, sums, strict=True)]
            self._metrics = metrics(found, joint_loss=self._anchors is not None)

    def _match_norms(self, gradients: Mapping[str, Tensor], sums: Sequence[Sums]) -> None:
        """Scale each group's gradient back to its norm: what is left is a change of direction."""
        for group, of_group in zip(self._groups, sums, strict=True):
            before, after = of_group.get("before"), of_group.get("after")
            factor = torch.where(after > 0, (before / after).sqrt(), 1.0)
            for fqn in group.fqns:
                part = gradients[fqn]
                part.mul_(factor.to(part.device, part.dtype))

    def _new_sums(self) -> list[Sums]:
        return [Sums(num_frequencies(g.num_nodes), self._shards.device) for g in self._groups]

    def _sum_over_ranks(self, sums: Sequence[Sums]) -> None:
        """Sum over ranks by one all-reduce; what several ranks hold counts once."""
        group = self._shards.group
        if group.size == 1:
            return
        here = [True] * len(sums) if self._blocks is None else self._blocks.counts_here
        for of_group, counts in zip(sums, here, strict=True):
            if not counts:
                of_group.flat.zero_()
        flat = group.sum(torch.cat([of_group.flat for of_group in sums]))
        parts = flat.split([of_group.flat.numel() for of_group in sums])
        for of_group, part in zip(sums, parts, strict=True):
            of_group.flat.copy_(part)

    def metrics(self) -> dict[str, Any]:
        """Values of the latest measured step by metric path.

        They are removed (fraction of the gradient's energy), rayleigh (mean frequency of the
        gradient), drift, energy by frequency and others.
        """
        return self._metrics

    @torch.no_grad()
    def commit(self) -> None:
        """Follow one applied optimizer step: renew graphs and the anchor when they are due.

        Raises SpectralError on all ranks if mean gradients are not finite when graphs are renewed.
        """
        self.steps += 1
        if self._blocks is not None and self.config.graph == "knn":
            self._blocks.commit()
            if self.steps == 1 or self.steps % self.config.refresh_steps == 0:
                self._blocks.renew_graphs()
        every = self.config.anchor_steps
        if self._anchors is not None and every and self.steps % every == 0:
            self._anchors.renew(self.fqns)

    @torch.no_grad()
    def after_swap(self) -> None:
        """Discard the state of singular values, which now belong to other triplets."""
        if not self._swapped:
            return
        if self._blocks is not None:
            self._blocks.forget(set(self._swapped))
        self._drift.restart(self._swapped)
        if self._anchors is not None:
            self._anchors.renew(self._swapped)

    def state_chunks(self, *, own: bool = False) -> Iterator[TensorChunk]:
        """Step count, graphs, mean gradients, anchors: each chunk from one rank that has it, or
        (`own`) everything that this rank needs to load itself again."""
        group = self._shards.group
        if not (group.writes or own):
            return
        if group.index == 0 or own:
            yield TensorChunk("filter/steps", torch.tensor(self.steps), (), ())
            blocks = [self._shards.order(fqn).column_blocks for fqn in sorted(self.fqns)]
            yield whole("filter/column_blocks", torch.tensor(blocks))
        for part in self._stateful():
            yield from part.state_chunks(own=own)

    @torch.no_grad()
    def load_state(self, read: ReadTensor) -> None:
        """Take over a checkpoint of any number of ranks and any backend."""
        self.steps = int(read("filter/steps"))
        blocks = dict(zip(sorted(self.fqns), read("filter/column_blocks").tolist(), strict=True))
        self._drift.load_state(read, blocks)
        if self._blocks is not None:
            self._blocks.load_state(read, blocks)
        if self._anchors is not None:
            self._anchors.load_state(read)

    @property
    def nbytes(self) -> int:
        """Bytes kept on this rank."""
        return sum(part.nbytes for part in self._stateful())

    def _stateful(self) -> list[BlockSet | Drift | Anchors]:
        return [part for part in (self._blocks, self._drift, self._anchors) if part is not None]

    def describe(self) -> str:
        """One line for a person: what is filtered, over what."""
        config, sizes = self.config, sorted({group.num_nodes for group in self._groups})
        nodes = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        graph = config.graph + (", nodes permuted" if config.permute_nodes else "")
        text = (
            f"filter: {config.kind} (strength {config.strength:g}) of {len(self.fqns)} parameters' "
            f"gradients in {len(self._groups)} graphs of {nodes} {config.nodes} ({graph}, "
            f"{config.laplacian})"
        )
        joint = f"; joint loss with mu = {config.joint_loss_mu:g}" if config.joint_loss_mu else ""
        return text + joint + ("; norms matched" if config.norm_matched else "")


def check_keys(config: FilterConfig) -> None:
    """Raise ConfigError for a filter that would do nothing or contradicts itself."""
    if not config.enabled:
        raise ConfigError("filter.kind=none and filter.joint_loss_mu=0: there is nothing to do")
    if config.norm_matched and config.joint_loss_mu:
        raise ConfigError(
            "filter.norm_matched is a control of the filter alone; set filter.joint_loss_mu=0"
        )
