"""Adam's moments at a swap, as `spectral.boundary_moments` says.

A moment belongs to its triplet, not to the column that holds it. At a swap a column gets another
triplet, so a moment that is kept moves to its triplet's new column, and newcomers start from zero.

An example with k = 5 and r = 3, where triplet 3 trains before and after:

    before   column 0 1 2 holds triplets [0, 2, 3]
    after    column 0 1 2 holds triplets [1, 3, 4]
    source   [-1, 2, -1]: column 1 takes the moments of old column 2; the others become zero

Triplet 3 stands in column 2 before and in column 1 after. Without the permutation its moments would
drive triplet 4. After a decomposition all triplets are new, so every source is -1: index 3 then
names another direction. Invariant: moments zeroed plus moments kept are all moments of the layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.sst.bank import Triplets
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore


@dataclass(frozen=True, kw_only=True)
class Held:
    """Indices of the triplets behind the columns and singular values of a layer."""

    directions: Tensor
    """Indices (r,) of the triplets behind u's and v's columns; empty if no moment may be kept."""
    sigma: Tensor
    """Indices of the triplets behind the singular values; empty if no moment may be kept."""


Change = tuple[Held, Held, int]
"""Triplets before a swap, triplets after it, and the number k of the matrix's triplets."""


def held(entry: Triplets, *, all_sigma: bool) -> Held:
    """The triplets that a layer holds now; none after a decomposition, which makes new ones."""
    if not entry.active.numel():
        return Held(directions=entry.active, sigma=entry.active)
    return Held(directions=entry.active, sigma=entry.held_sigma(all_sigma=all_sigma))


def positions(before: Tensor, after: Tensor, size: int) -> Tensor:
    """Position in `before` of each index of `after` (all below `size`); -1 for a newcomer.

    positions([0, 2, 3], [1, 3, 4], 5) is [-1, 2, -1].
    """
    place = torch.full((size,), -1, dtype=torch.int64, device=after.device)
    place[before.to(after.device)] = torch.arange(before.numel(), device=after.device)
    return place[after]


def update_all_moments(
    store: ParameterStore,
    collective: Collective,
    config: SpectralConfig,
    *,
    owners: Mapping[str, int],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    changes: Mapping[str, Change],
    device: torch.device,
) -> tuple[int, int]:
    """Zero the moments of what trained before, or keep those that `config` lets stay. Collective.

    Returns how many were zeroed and how many kept. Raises SpectralError if the store cannot move
    moments and has to.

    Args:
        owners: layer -> rank.
        shapes: layer -> shapes of its trained parameters.
        changes: layer -> change of its triplets, for the layers that this rank owns.
        device: the device of the parameters.
    """
    if config.boundary_moments == "reset":
        return store.reset_moments(
            [f"{n}.{leaf}" for n, leaves in shapes.items() for leaf in leaves]
        ), 0
    if not store.moves_moments:
        raise SpectralError(
            f"spectral.boundary_moments={config.boundary_moments} needs a store that can move "
            f"moments; {type(store).__name__} cannot: set it to reset"
        )
    zeroed = kept = 0
    for name, owner in owners.items():
        counts = update_moments(
            store,
            collective,
            config,
            name,
            owner=owner,
            shapes=shapes[name],
            change=changes.get(name),
            device=device,
        )
        zeroed, kept = zeroed + counts[0], kept + counts[1]
    return zeroed, kept


def update_moments(
    store: ParameterStore,
    collective: Collective,
    config: SpectralConfig,
    name: str,
    *,
    owner: int,
    shapes: Mapping[str, tuple[int, ...]],
    change: Change | None,
    device: torch.device,
) -> tuple[int, int]:
    """Keep what `config.boundary_moments` keeps of one layer's moments and zero the rest.

    Collective. Returns how many moments were zeroed and how many kept.

    Args:
        shapes: shapes of the layer's trained parameters u, v and sigma.
        change: the change of the layer's triplets; given on the owner.
        device: the device of the parameters.
    """
    zeroed = kept = 0
    for leaf, shape in shapes.items():
        source = torch.full(shape[-1:], -1, dtype=torch.int64, device=device)
        if leaf == "sigma" or config.boundary_moments == "keep_redrawn":
            if change is not None:
                before, after, k = change
                attribute = "sigma" if leaf == "sigma" else "directions"
                pair = (getattr(before, attribute), getattr(after, attribute))
                source.copy_(positions(*pair, k))
            collective.broadcast(source, owner)
        staying = int((source >= 0).sum())
        zeroed += store.move_moments(f"{name}.{leaf}", source)
        kept += 2 * staying * math.prod(shape[:-1])
    return zeroed, kept
