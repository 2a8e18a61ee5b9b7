"""Unit columns of u and v, restored inside every step of the optimizer that ZeRO wraps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from spectral_scale.backends.deepspeed.partitions import Layout
from spectral_scale.backends.deepspeed.shards import ZeroShards
from spectral_scale.errors import SpectralError
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.shard_geometry import column_square_sums, columns_divided
from spectral_scale.parallel.stacking import alike, stack


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
        """Fragments that cover the same part of matrices of one shape are worked on as a stack."""
        if not fqns:
            return
        shards = self._shards
        columns = [shards.shapes[fqn][1] for fqn in fqns]
        squares = torch.zeros(sum(columns), dtype=torch.float32, device=shards.device)
        held = [(i, f) for i, fqn in enumerate(fqns) if (f := shards.fragments[fqn]) is not None]
        masters = [fragment.master for _, fragment in held]
        starts = [(fragment.start % columns[i], columns[i]) for i, fragment in held]
        groups = alike(masters, starts)
        parts = squares.split(columns)
        for group in groups:
            sums = column_square_sums(stack(masters, group), *starts[group[0]])
            into = [parts[held[i][0]] for i in group]
            torch._foreach_copy_(into, sums.to(shards.device).unbind())
        norms = self._sum_over_ranks(squares).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
        parts = norms.split(columns)
        for group in groups:
            whole = stack(masters, group)
            divisors = torch.stack([parts[held[i][0]] for i in group]).to(whole.device)
            divided = columns_divided(whole, starts[group[0]][0], divisors)
            torch._foreach_copy_([masters[i] for i in group], divided.unbind())
        self._done.update(fqns)

    def _sum_over_ranks(self, squares: Tensor) -> Tensor:
        """Shards of columns add up; where every rank has every column, they are complete."""
        return squares if self._replicated else self._collective.all_reduce_sum(squares)
