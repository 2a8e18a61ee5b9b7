"""The truth of every converted matrix: all k triplets in full precision, owned by one rank.

Pure storage and mathematics: what is collected goes in, what is installed comes out. The bank lies
outside the module tree, so no host gathers, casts or saves it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.ops.decomposition import compose, svd

NOTHING = torch.empty(0, dtype=torch.int64)
"""No active triplets."""


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
        device: where triplets rest (the model's, or pinned host memory).
        compute_device: where decompositions and rebuilds run.
        dtype: float32, or float64 for tests.
    """

    def __init__(
        self, *, device: torch.device, compute_device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.compute_device, self.dtype = device, compute_device, dtype
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
        """Take a matrix over, at rest on the bank's device."""
        self._entries[name] = Triplets(
            u=self._rest(u),
            sigma=self._rest(sigma),
            v=self._rest(v),
            active=active.to(self.device),
            extra=extra.to(self.device),
        )

    def decompose(self, name: str, weight: Tensor) -> None:
        """Fill the entry from a dense weight (m, n). Raises ValueError if it is not finite."""
        u, sigma, v = svd(weight.detach().to(self.compute_device, self.dtype))
        self.put(name, u, sigma, v, active=NOTHING)

    def redecompose(self, name: str) -> None:
        """SVD of u diag(sigma) v^T: orthogonal again, sorted again, the same matrix.

        Nothing is active afterwards. Raises ValueError if it is not finite and LinAlgError if no
        driver succeeds; the old factors then stay, and still sum to the same matrix.
        """
        entry = self._entries[name]
        u, sigma, v = (t.to(self.compute_device) for t in (entry.u, entry.sigma, entry.v))
        self.put(name, *svd(compose(u, sigma, v)), active=NOTHING)

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
        """What does not train: residual (m, n), or u_fixed (m, k - r) and v_fixed (n, k - r).

        With extra triplets, the residual and their u_fixed (m, s) and v_fixed (n, s). The residual
        is always rebuilt from the full-precision triplets, so no rounding accumulates.
        """
        entry = self._entries[name]
        if factored:
            idle = entry.complement()
            return {"u_fixed": entry.u[:, idle], "v_fixed": entry.v[:, idle]}
        sigma = entry.sigma.clone()
        sigma[entry.held_sigma(all_sigma=False)] = 0
        u, sigma, v = (t.to(self.compute_device) for t in (entry.u, sigma, entry.v))
        values = {"residual": compose(u, sigma, v)}
        if entry.extra.numel():
            values |= {"u_fixed": entry.u[:, entry.extra], "v_fixed": entry.v[:, entry.extra]}
        return values

    def _rest(self, tensor: Tensor) -> Tensor:
        resting = tensor.detach().to(self.device, self.dtype).contiguous()
        if self.device.type == "cpu" and self.compute_device.type == "cuda":
            return resting.pin_memory()
        return resting
