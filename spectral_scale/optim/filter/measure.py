"""Measures the effect of a filter on one step's gradients: sums over ranks, and their metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALARS = (
    "before",
    "after",
    "signal",
    "form",
    "joint_loss",
    "drift",
    "anchor",
    "isolated",
)
"""Sums of a group: |G|^2, |H G|^2, |X|^2 and Tr(X^T L X) of the filtered signal X (G itself, or the
sizes of its blocks), mu Tr(D^T L D), |theta - theta_0|^2 and |theta_0|^2 on sampled entries, nodes
without an edge."""

MAX_BANDS = 32
"""Frequencies that are logged; those of larger graphs in bands."""


class Sums:
    """Accumulates the sums of one group on this rank, float64."""

    def __init__(self, num_frequencies: int, device: torch.device) -> None:
        self._values = torch.zeros(
            len(SCALARS) + 2 * num_frequencies, dtype=torch.float64, device=device
        )
        self._frequencies = num_frequencies

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a scalar sum."""
        self._values[SCALARS.index(name)] += value

    def get(self, name: str) -> Tensor:
        """A scalar sum, 0-dim."""
        return self._values[SCALARS.index(name)]

    def add_energies(self, energies: Tensor) -> None:
        """Add |phi_k^T X|^2 of each frequency k, (n,)."""
        self._part(0).add_(energies.to(self._values.device))

    def set_spectrum(self, values: Tensor) -> None:
        """The frequencies, (n,); on one rank only, since ranks are summed."""
        self._part(1).copy_(values)

    def _part(self, index: int) -> Tensor:
        start = len(SCALARS) + index * self._frequencies
        return self._values[start : start + self._frequencies]

    @property
    def flat(self) -> Tensor:
        """All sums, 1-D, to be summed over ranks in place."""
        return self._values


@dataclass(frozen=True)
class Measured:
    """A group's sums over all ranks."""

    kind: str
    """Name of its metrics."""
    scalars: dict[str, float]
    """Sums by the names in SCALARS."""
    energies: list[float]
    """|phi_k^T X|^2 by ascending frequency; empty for graphs without an eigenbasis."""
    spectrum: list[float]
    """Graph frequencies to which the energies belong."""


def measured(kind: str, flat: Tensor) -> Measured:
    """Read what `Sums.flat` holds."""
    numbers = flat.tolist()
    rest = numbers[len(SCALARS) :]
    return Measured(
        kind=kind,
        scalars=dict(zip(SCALARS, numbers, strict=False)),
        energies=rest[: len(rest) // 2],
        spectrum=rest[len(rest) // 2 :],
    )


def metrics(groups: Sequence[Measured], *, joint_loss: bool) -> dict[str, Any]:
    """Values by metric path; groups of one kind (a name, in different layers) are added up."""
    by_kind: dict[str, list[Measured]] = {}
    for group in groups:
        by_kind.setdefault(group.kind, []).append(group)
    values: dict[str, Any] = {}
    for kind, members in by_kind.items():
        values |= {f"filter/{name}/{kind}": x for name, x in _ratios(members).items()}
        first = members[0]
        if first.spectrum and all(len(m.spectrum) == len(first.spectrum) for m in members):
            count = len(members)
            spectrum = _bands([m.spectrum for m in members])
            values[f"filter/laplacian/{kind}"] = [sum(b) / (count * size) for b, size in spectrum]
            total = sum(m.scalars["signal"] for m in members) or 1.0
            energies = _bands([m.energies for m in members])
            values[f"filter/energy/{kind}"] = [sum(band) / total for band, _ in energies]
    values |= {f"filter/{name}": x for name, x in _ratios(groups).items()}
    values["filter/isolated_nodes"] = round(sum(g.scalars["isolated"] for g in groups))
    if joint_loss:
        values["filter/joint_loss"] = sum(g.scalars["joint_loss"] for g in groups)
    return values


def _ratios(groups: Sequence[Measured]) -> dict[str, float]:
    """Ratios of the sums over several groups; a ratio whose denominator is 0 is left out."""
    total = {name: sum(g.scalars[name] for g in groups) for name in SCALARS}
    found = {}
    if total["before"] > 0:
        found["removed"] = 1.0 - total["after"] / total["before"]
    if total["signal"] > 0:
        found["rayleigh"] = total["form"] / total["signal"]
    if total["anchor"] > 0:
        found["drift"] = (total["drift"] / total["anchor"]) ** 0.5
    return found


def _bands(rows: Sequence[Sequence[float]]) -> list[tuple[list[float], int]]:
    """The entries of all rows in at most 32 bands of neighbouring columns, and columns a band."""
    columns = len(rows[0])
    bounds = [columns * k // min(columns, MAX_BANDS) for k in range(min(columns, MAX_BANDS) + 1)]
    return [
        ([x for row in rows for x in row[start:stop]], stop - start)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
