"""The truth of every converted matrix: all k triplets in full precision, owned by one rank.

Pure storage and mathematics: trained values that were gathered go in, and the values to scatter
come out. The bank lies outside the module tree, so no backend shards, casts or saves it.

An example with k = 4 triplets of which r = 2 train, in residual storage:

    active = [0, 2]        the layer holds u[:, [0, 2]], sigma[[0, 2]], v[:, [0, 2]]
    residual               u[:, [1, 3]] diag(sigma[[1, 3]]) v[:, [1, 3]]^T

Decompositions and rebuilds use the device's one stream. A second one would have nothing to overlap
with: between two training steps the device is idle, each decomposition ends with its host waiting
for it, and the next step needs what the swap delivers.

Invariant: right after a swap, residual plus the trained product is the matrix itself, whichever
indices are active. So a swap changes what trains and never what the model computes. While the
layer trains, the bank's active columns are out of date; `commit` brings them up to date.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.ops.decomposition import compose, svd
from spectral_scale.ops.keyed_basis import keyed_columns
from spectral_scale.ops.sampling import sample_triplets

NOTHING = torch.empty(0, dtype=torch.int64)
"""Indices of no triplets."""


@dataclass(kw_only=True)
class Triplets:
    """One matrix (m, n) as u (m, k), sigma (k,), v (n, k), and which of them train."""

    u: Tensor
    """Left directions."""
    sigma: Tensor
    """Singular values, >= 0."""
    v: Tensor
    """Right directions."""
    active: Tensor
    """Ascending int64 indices (r,) of the triplets that train; empty before the first draw."""
    extra: Tensor = NOTHING
    """Ascending int64 indices (s,) of others of which only the singular value trains."""

    def complement(self) -> Tensor:
        """Ascending indices of the triplets that are not active."""
        idle = torch.ones(self.sigma.numel(), dtype=torch.bool, device=self.sigma.device)
        idle[self.active] = False
        return idle.nonzero().flatten()

    def held_sigma(self, *, all_sigma: bool) -> Tensor:
        """Indices of a layer's singular values in its order: active, then extra or all others."""
        others = self.complement() if all_sigma else self.extra.to(self.active.device)
        return torch.cat([self.active, others])


class SpectralBank:
    """Triplets of the matrices this rank owns.

    Args:
        device: where triplets are kept (the model's, or the CPU's memory, pinned).
        compute_device: where decompositions and rebuilds run.
        dtype: float32, or float64 for tests.
    """

    def __init__(
        self, *, device: torch.device, compute_device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.compute_device, self.dtype = device, compute_device, dtype
        self._pins = device.type == "cpu" and compute_device.type == "cuda"
        self._entries: dict[str, Triplets] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Triplets:
        return self._entries[name]

    def items(self) -> Iterator[tuple[str, Triplets]]:
        """Owned matrices in the order they were added."""
        yield from self._entries.items()

    def nbytes(self) -> int:
        """Bytes of all triplets held."""
        return sum(t.nbytes for e in self._entries.values() for t in (e.u, e.sigma, e.v))

    def put(
        self,
        name: str,
        u: Tensor,
        sigma: Tensor,
        v: Tensor,
        active: Tensor,
        extra: Tensor = NOTHING,
    ) -> None:
        """Take a matrix over, onto the bank's device."""
        old = self._entries.get(name)
        self._entries[name] = Triplets(
            u=self._kept(u, None if old is None else old.u),
            sigma=self._kept(sigma, None if old is None else old.sigma),
            v=self._kept(v, None if old is None else old.v),
            active=active.to(self.device),
            extra=extra.to(self.device),
        )

    def decompose(self, name: str, weight: Tensor) -> None:
        """Fill the entry from a dense weight (m, n). Raises ValueError if it is not finite."""
        u, sigma, v = svd(weight.detach().to(self.compute_device, self.dtype))
        self.put(name, u, sigma, v, active=NOTHING)

    def discard(self, name: str, weight: Tensor, initialization: str, *, seed: int) -> None:
        """Fill the entry with random orthonormal directions, functions of seed and name.

        Args:
            name: the matrix.
            weight: dense (m, n), of which only the singular values are kept.
            initialization: random, or zero, which keeps not even those.
            seed: the run's seed.
        """
        self.decompose(name, weight)
        entry = self._entries[name]
        for side in ("u", "v"):
            directions: Tensor = getattr(entry, side)
            size, k = directions.shape
            columns = keyed_columns(
                size, np.arange(k), seed, "initial", name, side, dtype=self.dtype
            )
            directions.copy_(columns)
        if initialization == "zero":
            entry.sigma.zero_()

    def redecompose(self, name: str) -> None:
        """SVD of u diag(sigma) v^T: orthogonal again, sorted again, the same matrix.

        Nothing is active afterwards. Raises ValueError if it is not finite and LinAlgError if no
        driver succeeds; the old factors then stay, and still sum to the same matrix.
        """
        entry = self._entries[name]
        u, sigma, v = self._computable(entry.u, entry.sigma, entry.v)
        self.put(name, *svd(compose(u, sigma, v)), active=NOTHING)

    def draw(
        self, name: str, config: SpectralConfig, *, seed: int, position: tuple[int, int]
    ) -> int:
        """Choose the active and extra triplets of a matrix; returns how many were not active.

        The draw is a pure function of the spectrum and of (seed, name, round, iteration): noise
        keyed by these four is added to log p (Gumbel-top-r), and the r largest sums win. So a
        resumed run, or one with another number of ranks, draws the same triplets without a
        generator's state in the checkpoint, and the owner draws alone.

        Args:
            name: the matrix, which must be in the bank.
            config: how many triplets train, and by which rule they are drawn.
            seed: the run's seed.
            position: (round, iteration within the round).
        """
        entry = self._entries[name]
        round_, iteration = position
        drawn = sample_triplets(
            entry.sigma,
            config.spectral_rank,
            config.sampling,
            seed=seed,
            layer=name,
            round=round_,
            iteration=iteration,
        )
        before = set(entry.active.tolist())
        entry.active = drawn.to(entry.sigma.device)
        if config.extra_sigma:
            others = entry.complement()
            extra = sample_triplets(
                entry.sigma[others],
                config.extra_sigma,
                "uniform",
                seed=seed,
                layer=f"{name}/extra",
                round=round_,
                iteration=iteration,
            )
            entry.extra = others[extra.to(others.device)]
        return len(set(drawn.tolist()) - before)

    def commit(self, name: str, u_a: Tensor, sigma: Tensor, v_a: Tensor) -> None:
        """Write trained values back, in place.

        u_a (m, r) and v_a (n, r) go to the active columns; sigma is (r + s,) of the active and the
        extra triplets, or (k,): the active ones, then the others in ascending order. Raises
        ValueError, before anything is written, if a value is not finite.
        """
        if not all(bool(torch.isfinite(t).all()) for t in (u_a, sigma, v_a)):
            raise ValueError("its trained triplets hold NaN or infinity")
        entry = self._entries[name]
        entry.u[:, entry.active] = u_a.to(self.device, self.dtype)
        entry.v[:, entry.active] = v_a.to(self.device, self.dtype)
        order = entry.held_sigma(all_sigma=sigma.numel() == entry.sigma.numel())
        entry.sigma[order] = sigma.to(self.device, self.dtype)

    def trained_values(self, name: str, *, all_sigma: bool) -> dict[str, Tensor]:
        """u (m, r), v (n, r) and sigma (r + s,) or (k,), as layers hold them."""
        entry = self._entries[name]
        return {
            "u": entry.u[:, entry.active],
            "v": entry.v[:, entry.active],
            "sigma": entry.sigma[entry.held_sigma(all_sigma=all_sigma)],
        }

    def frozen_values(self, name: str, *, factored: bool) -> dict[str, Tensor]:
        """Values that do not train: residual (m, n), or u_fixed (m, k - r) and v_fixed (n, k - r).

        With s extra triplets, there is their u_fixed (m, s) and v_fixed (n, s) beside the residual,
        from which they are left out. The residual
        is always rebuilt from the full-precision triplets, so no rounding accumulates.
        """
        entry = self._entries[name]
        if factored:
            idle = entry.complement()
            return {"u_fixed": entry.u[:, idle], "v_fixed": entry.v[:, idle]}
        sigma = entry.sigma.clone()
        sigma[entry.held_sigma(all_sigma=False)] = 0
        u, sigma, v = self._computable(entry.u, sigma, entry.v)
        values = {"residual": compose(u, sigma, v)}
        if entry.extra.numel():
            values |= {"u_fixed": entry.u[:, entry.extra], "v_fixed": entry.v[:, entry.extra]}
        return values

    def _kept(self, tensor: Tensor, place: Tensor | None) -> Tensor:
        """The values on the bank's device; pinned memory is taken from `place`, if it fits.

        Pinning pages costs more than copying into them, and a round would give back as many pages
        as it takes: each matrix keeps those of its first decomposition for the whole run.
        """
        if not self._pins:
            return tensor.detach().to(self.device, self.dtype).contiguous()
        if place is None or place.shape != tensor.shape:
            place = torch.empty(tensor.shape, dtype=self.dtype, pin_memory=True)
        return place.copy_(tensor.detach())

    def _computable(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Where decompositions and rebuilds run; from pinned memory the copies overlap."""
        return tuple(t.to(self.compute_device, non_blocking=self._pins) for t in tensors)
