"""Unit columns of u and v, restored inside every step of the optimizer that ZeRO wraps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from spectral_scale.backends.deepspeed.partitions import Layout
from spectral_scale.backends.deepspeed.shards import ZeroShards
from spectral_scale.errors import SpectralError
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.shard_geometry import column_square_sums, divide_columns


class Directions:
    """Scales the columns of u and v to unit length inside every optimizer step.

    `after_step` is an optimizer's post-hook: it runs after the update of the masters and before
    DeepSpeed copies them into the module. Retraction then costs one all-reduce of a number a
    column, no weight travels twice, and the module's weights are exactly the rounded masters.

    Args:
        layout: where ZeRO keeps what.
        shards: the masters.
        names: of u and v.
        collective: all ranks of the engine.
    """

    def __init__(
        self, layout: Layout, shards: ZeroShards, names: Iterable[str], collective: Collective
    ) -> None:
        self._shards, self._collective = shards, collective
        self._replicated = layout.replicated
        self._done: set[str] = set()
        directions = set(names)
        self._by_flat: dict[int, list[str]] = {
            id(flat.tensor): [n for n in shards.members(flat.tensor) if n in directions]
            for flat in layout.flats()
        }

    def require(self, fqns: Iterable[str]) -> None:
        """Raise SpectralError unless the last step retracted all of `fqns`."""
        if missed := sorted(set(fqns) - self._done):
            raise SpectralError(
                f"{missed[0]} was not retracted in the last optimizer step; call "
                "store.register_step_hooks() once before training, and follow each applied "
                "engine.step() by one controller.after_step()"
            )
        self._done.clear()

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Retract what was stepped: DeepSpeed steps group by group or all at once, and each flat
        tensor passes once."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                self._retract(self._by_flat[id(flat)])

    @torch.no_grad()
    def _retract(self, fqns: list[str]) -> None:
        if not fqns:
            return
        shards = self._shards
        columns = [shards.shapes[fqn][1] for fqn in fqns]
        squares = torch.zeros(sum(columns), dtype=torch.float32, device=shards.device)
        for fqn, part in zip(fqns, squares.split(columns), strict=True):
            fragment = shards.fragments[fqn]
            if fragment is not None:
                sums = column_square_sums(fragment.master, fragment.start, len(part))
                part += sums.to(shards.device)
        squares = self._sum_over_ranks(squares)
        norms = squares.sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
        for fqn, part in zip(fqns, norms.split(columns), strict=True):
            fragment = shards.fragments[fqn]
            if fragment is not None:
                divide_columns(fragment.master, fragment.start, part)
        self._done.update(fqns)

    def _sum_over_ranks(self, squares: Tensor) -> Tensor:
        """Shards of columns add up; where every rank has every column, they are complete."""
        return squares if self._replicated else self._collective.all_reduce_sum(squares)
