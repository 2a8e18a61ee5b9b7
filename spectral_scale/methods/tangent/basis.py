"""The bases u0, v0 of an iteration: where they come from, and what a checkpoint says of them.

`random` takes r columns at a time of an orthonormal matrix that is drawn anew every round. With
k = 7 and r = 3 a round has three iterations, which take columns 0-2, 3-5 and (6, 0, 1): all k are
taken once before the next matrix is drawn. `svd` takes singular vectors of the present weight, by
the rule by which SST draws triplets.

Only owners draw. Their state names the bases (`random`: the key) or holds them (`svd`), so that a
resumed run continues with the same bits even if its own seed or schedule is another.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spectral_scale.config.methods.tangent import basis_of
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.ops.decomposition import svd
from spectral_scale.ops.keyed_basis import keyed_columns
from spectral_scale.ops.sampling import sample_triplets

State = dict[str, Tensor]
"""What names or holds the bases of one matrix."""


class Basis(Protocol):
    """A rule for the bases of all matrices."""

    phase: str
    """The phase of a swap in which it draws."""
    leaves: tuple[str, ...]
    """Names of the tensors of a state."""

    def draw(self, name: str, weight: Tensor, iteration: int) -> State:
        """State of the bases of a matrix `weight` (m, n) for an iteration."""

    def vectors(self, name: str, weight: Tensor, state: Mapping[str, Tensor]) -> list[Tensor]:
        """u0 (m, r) and v0 (n, r) of a state, on the device and in the dtype of `weight`."""

    def count_new(self, weight: Tensor, before: Mapping[str, Tensor], after: State) -> int:
        """Columns of u0 of the state `after` that `before`, the one it replaces, has not."""


def block(k: int, r: int, iteration: int) -> tuple[int, np.ndarray]:
    """Round of an iteration, and the r of k columns of the round's matrix that it takes.

    block(7, 3, 5) is (1, [6, 0, 1]): the last iteration of a round is filled up from the first's.
    """
    round_, number = divmod(iteration, -(-k // r))
    return round_, np.arange(number * r, (number + 1) * r) % k


class RandomBasis:
    """Columns of keyed orthonormal matrices, one matrix a side and round."""

    phase = "sample"
    leaves: tuple[str, ...] = ("key",)

    def __init__(self, config: SpectralConfig, seed: int) -> None:
        self._rank, self._seed = config.spectral_rank, seed

    def draw(self, name: str, weight: Tensor, iteration: int) -> State:
        """The key: (seed, iteration)."""
        return {"key": torch.tensor([self._seed, iteration])}

    def vectors(self, name: str, weight: Tensor, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The columns that the key names, computed."""
        seed, iteration = state["key"].tolist()
        round_, positions = block(min(weight.shape), self._rank, iteration)
        return [
            keyed_columns(
                size,
                positions,
                *(seed, "basis", name, side, round_),
                device=weight.device,
                dtype=weight.dtype,
            )
            for side, size in zip(("left", "right"), weight.shape, strict=True)
        ]

    def count_new(self, weight: Tensor, before: Mapping[str, Tensor], after: State) -> int:
        """Columns at other positions, or all of them in another round."""
        matrices, columns = [], []
        for state in (before, after):
            seed, iteration = state["key"].tolist()
            round_, positions = block(min(weight.shape), self._rank, iteration)
            matrices.append((seed, round_))
            columns.append(set(positions.tolist()))
        same = matrices[0] == matrices[1]
        return len(columns[1] - columns[0]) if same else self._rank


class SvdBasis:
    """Singular vectors of the weight as it is at the swap, drawn as SST draws triplets."""

    phase = "decompose"
    leaves: tuple[str, ...] = ("u0", "v0")

    def __init__(self, config: SpectralConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def draw(self, name: str, weight: Tensor, iteration: int) -> State:
        """r pairs of singular vectors. Raises ValueError and LinAlgError as `svd` does."""
        rank = self._config.spectral_rank
        u, sigma, v = svd(weight)
        round_, number = divmod(iteration, -(-min(weight.shape) // rank))
        chosen = sample_triplets(
            sigma,
            rank,
            self._config.sampling,
            seed=self._seed,
            layer=name,
            round=round_,
            iteration=number,
        ).to(u.device)
        return {"u0": u[:, chosen], "v0": v[:, chosen]}

    def vectors(self, name: str, weight: Tensor, state: Mapping[str, Tensor]) -> list[Tensor]:
        """What the state holds."""
        return [state[leaf].to(weight) for leaf in self.leaves]

    def count_new(self, weight: Tensor, before: Mapping[str, Tensor], after: State) -> int:
        """Columns that are like none of those before, up to sign."""
        likeness = (after["u0"].t() @ before["u0"].to(after["u0"])).abs().amax(dim=1)
        return int((likeness < 0.5).sum())


def make_basis(config: SpectralConfig, seed: int) -> Basis:
    """The rule that `spectral.basis` names."""
    rules: dict[str, type[RandomBasis] | type[SvdBasis]] = {"random": RandomBasis, "svd": SvdBasis}
    return rules[basis_of(config)](config, seed)
