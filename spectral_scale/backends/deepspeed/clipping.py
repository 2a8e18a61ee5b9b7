"""Norms over masters and gradients that are cut over ranks: clipping, and retraction."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectral_scale.errors import SpectralError
from spectral_scale.optim.groups import group_kind
from spectral_scale.parallel.shard_geometry import column_square_sums, divide_columns
from spectral_scale.parallel.table import parameter_table

if TYPE_CHECKING:
    from spectral_scale.backends.deepspeed.store import ZeroStore


def gradients_by_kind(store: "ZeroStore") -> dict[str, list[Tensor]]:
    """This rank's pieces of the reduced gradients, after the last backward pass of a step."""
    found: dict[str, list[Tensor]] = {}
    for flat in store.layout.flats():
        parts = found.setdefault(group_kind(flat.group.get("name", "dense")), [])
        for parameter in flat.members:
            fragment = store.fragments[store.names[id(parameter)]]
            part = None if fragment is None else store.layout.gradient(fragment, parameter)
            if part is not None:
                parts.append(part)
    return found


def norms_by_kind(
    store: "ZeroStore", gradients: Mapping[str, Sequence[Tensor]], *, loss_scale: float
) -> dict[str, Tensor]:
    """Norms over all ranks' pieces, by kind. One all-reduce of a number a kind.

    Args:
        store: of the engine.
        gradients: of `gradients_by_kind`.
        loss_scale: what the gradients were multiplied by (fp16).
    """
    device = next(iter(store.parameters.values())).device
    squares = torch.stack([_square_sum(parts, device) for parts in gradients.values()])
    if not store.layout.replicated:
        squares = store.collective.all_reduce_sum(squares)
    return dict(zip(gradients, squares.sqrt() / loss_scale, strict=True))


def _square_sum(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=device)
    for part in parts:
        total += part.detach().float().square().sum().to(device)
    return total


class Directions:
    """Scales the columns of u and v to unit length inside every optimizer step.

    It runs after the update of the masters and before DeepSpeed copies them into the module, so
    that retraction costs one all-reduce of a number a column and no weight travels twice, and the
    module's weights are exactly the rounded masters.
    """

    def __init__(self, store: "ZeroStore", model: nn.Module) -> None:
        self._store = store
        self._done: set[str] = set()
        roles = {fqn: info.role for fqn, info in parameter_table(model).items()}
        self._by_flat: dict[int, list[str]] = {}
        for flat in store.layout.flats():
            names = [store.names[id(parameter)] for parameter in flat.members]
            self._by_flat[id(flat.tensor)] = [n for n in names if roles[n] == "direction"]
        store.inner.register_step_post_hook(self._after_step)

    def require(self, fqns: Iterable[str]) -> None:
        """Raise SpectralError unless the last step retracted all of `fqns`."""
        if missed := sorted(set(fqns) - self._done):
            raise SpectralError(
                f"{missed[0]} was not retracted in the last optimizer step; follow each applied "
                "engine.step() by one controller.after_step()"
            )
        self._done.clear()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Host optimizers step group by group or all at once; each flat tensor passes once."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                self._retract(self._by_flat[id(flat)])

    @torch.no_grad()
    def _retract(self, fqns: list[str]) -> None:
        if not fqns:
            return
        store, fragments = self._store, self._store.fragments
        columns = [store.layout.shape(store.parameters[fqn])[1] for fqn in fqns]
        squares = torch.zeros(sum(columns), dtype=torch.float32, device=store.device)
        for fqn, part in zip(fqns, squares.split(columns), strict=True):
            fragment = fragments[fqn]
            if fragment is not None:
                part += column_square_sums(fragment.master, fragment.start, len(part)).to(
                    store.device
                )
        squares = self._sum_over_ranks(squares)
        norms = squares.sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
        for fqn, part in zip(fqns, norms.split(columns), strict=True):
            fragment = fragments[fqn]
            if fragment is not None:
                divide_columns(fragment.master, fragment.start, part)
        self._done.update(fqns)

    def _sum_over_ranks(self, squares: Tensor) -> Tensor:
        """Pieces of columns add up; where every rank has every column, they are complete."""
        store = self._store
        return squares if store.layout.replicated else store.collective.all_reduce_sum(squares)
